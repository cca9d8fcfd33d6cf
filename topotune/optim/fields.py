"""The fields of many tensors: their start, their place in the state, and a step of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from topotune.seeding import derive_seed

SKIPPED, ENERGY, CONTROLLED, CURRENT = range(4)
"""Places of the common entries in a tensor's ``scalars``; a coupling's coefficients follow."""

COMMON = 4

BAND_WIDTH = 10.0
"""``band`` damps fields whose energy is above this multiple of the target."""

BAND_DAMPING = 0.9
"""The factor by which ``band`` damps fields in one step."""

TINY = 1e-290
"""Added to an energy that is divided by: fields that underflowed to zero stay zero, not NaN."""

LARGE = 16384
"""Elements from which a tensor is worth calls and tricks of its own on the CPU."""

Array: TypeAlias = Any
"""A float64 NumPy array (CPU) or torch tensor (elsewhere). The recursions of the scalars are
written once, in operations that both have: NumPy's cost a tenth of torch's on a handful of
numbers, and torch's need no host."""


@dataclass(frozen=True)
class Move:
    """The numbers of one step that all tensors of a parameter group share.

    Attributes:
        keep: ``1 - eta``.
        rate: ``eta / mu0``, negated when the objective is maximised (J is odd in the gradient).
        target: the energy that the control aims at.
        exact: whether the control is ``exact``; else ``band``.
    """

    keep: float
    rate: float
    target: float
    exact: bool


def field_dtype(parameter: Tensor) -> torch.dtype:
    """The type that a parameter's fields are kept in: float64 for float64, else float32."""
    return torch.float64 if parameter.dtype is torch.float64 else torch.float32


def initial_fields(
    parameter: Tensor, scale: float, kind: str, seed: int, index: int
) -> tuple[Tensor, Tensor]:
    """The fields ``alpha0, beta0`` of a parameter, contiguous and of its shape.

    Args:
        parameter: as it stands before its first step.
        scale: ``field_init_scale``.
        kind: ``tanh_cos``: ``scale * tanh(p)`` and ``scale / 2 * cos(p)``, which a restart
            repeats; ``normal``: standard normal numbers times ``scale`` and ``scale / 2``.
        seed: of ``normal``; the numbers are drawn on the CPU, so that they do not depend on the
            device.
        index: the parameter's place in the optimizer, so that equal shapes get unequal fields.
    """
    dtype = field_dtype(parameter)
    if kind == "tanh_cos":
        values = parameter.detach().to(dtype).contiguous()
        return torch.tanh(values).mul_(scale), torch.cos(values).mul_(0.5 * scale)
    generator = torch.Generator().manual_seed(derive_seed(seed, index))
    alpha = torch.randn(parameter.shape, generator=generator, dtype=dtype).mul_(scale)
    beta = torch.randn(parameter.shape, generator=generator, dtype=dtype).mul_(0.5 * scale)
    return alpha.to(parameter.device), beta.to(parameter.device)


def control(xp: Any, energy: Array, move: Move) -> Array:
    """The (k,) factors that the energy control multiplies both fields of k tensors by.

    ``exact`` is the paper's pseudocode; ``band`` follows its section on stabilisation: amplify to
    the target from below, damp above a multiple of it, else leave.
    """
    to_target = xp.sqrt(move.target / (energy + TINY))
    if move.exact:
        return to_target
    # A tensor among the choices keeps the result float64.
    unity = xp.ones_like(energy)
    damping = xp.where(energy > BAND_WIDTH * move.target, BAND_DAMPING, unity)
    return xp.where(energy < move.target, to_target, damping)


def host_readable(device: torch.device) -> bool:
    """Whether the host can read a number without waiting, and so may do the small sums."""
    return device.type == "cpu"


class FieldBatch(ABC):
    """The fields of all tensors of one parameter group on one device and of one type.

    The fields lie in the optimizer's state, a dict a parameter: two tensors of the parameter's
    shape, named by :attr:`tensors`, and ``scalars``, a float64 vector: how many steps were
    skipped, raw energy, controlled energy, ``|J|``, the coupling's coefficients, and constants of
    the start. This class lays the vectors of k tensors side by side as the columns of one matrix,
    so that one small operation serves all of them and the host never waits for the device; the
    state's entries become views of it.

    Attributes:
        tensors: names of the two tensors in the state.
        basis_size: how many of them a step reads.
        coefficients: how many scalars a step moves.
        scalar_count: length of ``scalars``.
    """

    tensors: ClassVar[tuple[str, str]]
    basis_size: ClassVar[int]
    coefficients: ClassVar[int]
    scalar_count: ClassVar[int]

    def __init__(self, states: Sequence[dict[str, Tensor]]) -> None:
        names = self.tensors[: self.basis_size]
        self.shaped = [[state[name] for state in states] for name in names]
        self.basis = [[tensor.view(-1) for tensor in column] for column in self.shaped]
        self.dtype = self.basis[0][0].dtype
        self.sizes = [tensor.numel() for tensor in self.basis[0]]
        self.elements = sum(self.sizes)
        self.large = [i for i, size in enumerate(self.sizes) if size >= LARGE]
        self._states = list(states)
        self._matrix = torch.stack([state["scalars"] for state in states], dim=1)
        self._columns = self._matrix.unbind(1)
        self._addresses = list(map(Tensor.data_ptr, self._columns))
        self.device = self._matrix.device
        self.negligible = torch.finfo(self.dtype).tiny * 2.0**24
        self.on_cpu = host_readable(self.device)
        self.xp: Any = np if self.on_cpu else torch
        rows: Array = self._matrix.numpy() if self.on_cpu else self._matrix
        end = COMMON + self.coefficients
        self.skipped: Array = rows[SKIPPED]
        self.report: Array = rows[:COMMON]
        self.live: Array = rows[ENERGY:end]
        self.coefficient_rows: Array = rows[COMMON:end]
        self.constants: Array = rows[end:]
        self.fresh: Array = self.xp.empty_like(self.live)
        self.bad: Array = self.skipped != self.skipped
        self._settle()

    def _settle(self) -> None:
        """Make the columns of this batch's matrix the states' scalars."""
        for state, column in zip(self._states, self._columns, strict=True):
            state["scalars"] = column
        self._read_constants()

    def _read_constants(self) -> None:  # noqa: B027 - not every coupling needs any
        """Keep what the host needs of the constants, where it can read them."""

    def adopt(self) -> bool:
        """Copy scalars that lie elsewhere: another batch stepped on some of these tensors.

        Returns:
            Whether the states' scalars are, or could be made, this batch's.
        """
        scalars = [state.get("scalars") for state in self._states]
        if all(map(is_, scalars, self._columns)) and (
            list(map(Tensor.data_ptr, self._columns)) == self._addresses
        ):
            return True
        wanted = ((self.scalar_count,), torch.float64, self.device)
        found = [entry for entry in scalars if isinstance(entry, Tensor)]
        fitting = [entry for entry in found if (entry.shape, entry.dtype, entry.device) == wanted]
        if len(fitting) < len(scalars):
            return False
        self._matrix.copy_(torch.stack(fitting, dim=1))
        self._columns = self._matrix.unbind(1)
        self._settle()
        return True

    @classmethod
    @abstractmethod
    def start(cls, alpha: Tensor, beta: Tensor) -> dict[str, Tensor]:
        """The state entries of one tensor whose fields begin at ``alpha, beta``."""

    @staticmethod
    @abstractmethod
    def materialise(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The fields ``alpha, beta`` of one tensor, as fresh tensors of its shape."""

    @abstractmethod
    def _move(self, gradients: Sequence[Tensor], move: Move) -> tuple[Array, Array, Array]:
        """Current and coupling of one step.

        Args:
            gradients: k contiguous 1-d tensors in the fields' type. Where one is not finite,
                ``self.bad`` is set and the numbers returned for it do not matter.
            move: the numbers of the step.

        Returns:
            Coefficients before control (c, k), raw energy (k,), current (k,).
        """

    @abstractmethod
    def _gaps(self, factor: float) -> list[Tensor]:
        """``factor * (alpha - beta)`` of every tensor, fresh and of the parameter's shape; zeros
        where the gradient of the last step was not finite."""

    def advance(self, gradients: Sequence[Tensor], move: Move) -> None:
        """One step of the fields: current, coupling, energy, control.

        Args:
            gradients: k contiguous 1-d tensors in the fields' type. One with a non-finite entry,
                or one that makes the energy overflow, leaves its fields as they are and is
                counted.
            move: the numbers of the step.
        """
        xp = self.xp
        # Overflow is reported through the energy, not through warnings.
        with np.errstate(all="ignore"):
            coefficients, energy, current = self._move(gradients, move)
            scale = control(xp, energy, move)
            poisoned = self.bad
            self.bad = poisoned | ~xp.isfinite(energy)
            # Where the host can see that all went well, the step is written in place.
            clean = self.on_cpu and not self.bad.any()
            new = self.live if clean else self.fresh
            new[0] = energy
            new[1] = energy * scale * scale
            new[2] = abs(current)
            new[3:] = coefficients * scale
            if not clean:
                # Where the dynamics overflowed, the energy says so and nothing else is written.
                self.live[0] = xp.where(poisoned, self.live[0], energy)
                self.live[1:] = xp.where(self.bad, self.live[1:], new[1:])
                self.skipped += self.bad

    def add_correction(
        self, parameters: list[Tensor], weight: float, held: Sequence[Tensor] = ()
    ) -> None:
        """``p += weight * tanh(alpha - beta)`` for each of k tensors, in place.

        Args:
            parameters: the tensors.
            weight: of the correction.
            held: empty, or k gradients: where one is zero, its element is left as it is.
        """
        factor = self._tanh_factor(self.elements)
        gaps = self._gaps(factor)
        for gap, gradient in zip(gaps, held, strict=bool(held)):
            gap.masked_fill_(gradient == 0, 0.0)
        self._add_tanh(parameters, gaps, weight, factor)

    def _tanh_factor(self, elements: int) -> float:
        """2.0 where :meth:`_add_tanh` uses the sigmoid and wants the gaps doubled, else 1.0."""
        return 2.0 if self.on_cpu and elements >= LARGE else 1.0

    def _add_tanh(
        self, parameters: list[Tensor], gaps: list[Tensor], weight: float, factor: float
    ) -> None:
        """``p += weight * tanh(gap / factor)``, in place; ``factor`` from :meth:`_tanh_factor`.

        Large tensors on the CPU take ``tanh(x)`` as ``2 (sigmoid(2x) - 1/2)``: torch's vectorised
        sigmoid is three to four times as fast as its tanh there. The absolute error is one
        rounding of the sigmoid (1.2e-7 in float32), on a term that stands beside Adam's direction
        of order one.
        """
        if factor == 2.0:
            torch._foreach_sigmoid_(gaps)
            torch._foreach_sub_(gaps, 0.5)
        else:
            torch._foreach_tanh_(gaps)
        torch._foreach_add_(parameters, gaps, alpha=weight * factor)

    def _array(self, measured: list[Tensor], width: int) -> Array:
        """0-d tensors, ``width`` of each of k tensors, as a (width, k) float64 array."""
        if self.on_cpu:
            return torch.stack(measured).numpy().astype(np.float64).reshape(width, -1)
        return torch.stack(measured).double().view(width, -1)

    def weights(self, rows: Array) -> list[Any]:
        """Rows of weights as what ``torch._foreach`` operations take, one list a row.

        A weight is zero for a tensor whose step was skipped, and zero instead of so small that
        the products would be denormal: processors are slow at those and no step can see them.
        """
        xp = self.xp
        kept = xp.where(self.bad | (abs(rows) < self.negligible), 0.0, rows)
        return kept.tolist() if self.on_cpu else [self._factors(row) for row in kept]

    def _factors(self, row: Array) -> Any:
        """A (k,) array as what ``torch._foreach`` operations take: numbers or 0-d tensors."""
        return row.tolist() if self.on_cpu else row.to(self.dtype).unbind(0)


def scalars(alpha: Tensor, beta: Tensor, *entries: float | Tensor) -> Tensor:
    """The float64 vector of one tensor at its start: common entries, then ``entries``."""
    energy = 0.5 * mean_of_products(alpha, alpha) + 0.5 * mean_of_products(beta, beta)
    values: list[float | Tensor] = [0.0, energy, energy, 0.0, *entries]
    filled = torch.zeros(len(values), dtype=torch.float64, device=alpha.device)
    for place, value in enumerate(values):
        filled[place] = value
    return filled


def mean_of_products(left: Tensor, right: Tensor) -> Tensor:
    """``mean(left * right)`` in float64, 0-d."""
    return (left.double() * right.double()).mean()
