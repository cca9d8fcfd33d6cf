"""What relaxes: the interface of a field, and how one is built and tried."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from topotune.errors import ConfigError, PluginError
from topotune.plugins import accepted_names

R = TypeVar("R")

SAMPLES = 3
"""A user's field is tried on so many random samples before anything is trained with it."""

APART = 1e-3
"""Relative difference that rounding in float32 does not explain."""


class Capped(NamedTuple):
    """A matrix whose spectral norm is kept below a cap.

    A kernel of more than two dimensions, such as a convolution's (out, in, k, k), is capped as the
    operator (out, in*k*k) that takes one patch to the channels of one place. The convolution as a
    whole, whose patches overlap, may have a norm up to the square root of the kernel's area larger.

    Attributes:
        weight: (rows, columns), or a kernel (out, in, ...), or with ``heads`` (heads, rows,
            columns).
        cap: the largest norm; 0 leaves the matrix alone.
        heads: the weight is a matrix a head, each with a norm of its own.
    """

    weight: nn.Parameter
    cap: float
    heads: bool = False

    @property
    def matrix(self) -> Tensor:
        """What the cap acts on, (rows, columns) or (heads, rows, columns)."""
        return self.weight if self.heads else self.weight.flatten(1)

    def check(self, owner: str) -> None:
        """Refuse what has no such norm.

        Args:
            owner: the field's name, for the text.

        Raises:
            PluginError: the weight is not a matrix, kernel or stack of matrices, or the cap is
                not a finite number from 0.
        """
        shape = tuple(self.weight.shape)
        if len(shape) != 3 if self.heads else len(shape) < 2:
            wanted = "(heads, rows, columns)" if self.heads else "at least two dimensions"
            raise PluginError(
                f"field {owner}: capped() holds a weight of shape {shape}; a spectral norm"
                f"{' a head' if self.heads else ''} needs {wanted}"
            )
        if not (self.cap >= 0 and math.isfinite(self.cap)):
            raise PluginError(
                f"field {owner}: capped() holds a cap of {self.cap!r}; it must be a finite number "
                "of at least 0 (0: no cap)"
            )


class Field(nn.Module, ABC):
    """A vector field over the state of a network, driven by its input.

    The state is one flat tensor ``s`` (B, S): first the tokens ``h``, N of width D, then whatever
    hidden units the field has. The network adds damping ``-lambda h`` and the recirculation to
    the tokens' part of :meth:`flow`; a field knows neither.

    A conservative field has an energy: ``flow = -(1/G) dE/ds`` with a positive diagonal metric
    ``G``. Subclass this, write :meth:`energy`, and leave :meth:`flow` to automatic
    differentiation, or write the force by hand and have
    :class:`topotune.testing.EnergyContract` check it. Name the class in a search file as
    ``field: "my_module:MyField"``. Its constructor gets those of ``tokens``, ``width``, ``heads``,
    ``hidden``, ``memory``, ``scale``, ``sharpness`` and ``caps`` that it names.

    Attributes:
        tokens, width: N and D.
        size: S, at least N * D.
        feature_size: R, the numbers that the readout sees.
        conservative: whether there is an energy.
    """

    conservative: bool = True

    def __init__(self, tokens: int, width: int, size: int, feature_size: int) -> None:
        super().__init__()
        self.tokens, self.width, self.size, self.feature_size = tokens, width, size, feature_size

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (B, N, D) and the hidden units (B, S - N D), as views of the state."""
        count = self.tokens * self.width
        return state[:, :count].view(-1, self.tokens, self.width), state[:, count:]

    def initial(self, drive: Tensor) -> Tensor:
        """Where a relaxation starts: the tokens at the drive (B, N, D), hidden units at zero."""
        return self.widen(drive)

    def widen(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) as a state (B, S) whose hidden units are zero."""
        rest = self.size - self.tokens * self.width
        return torch.nn.functional.pad(tokens.flatten(1), (0, rest))

    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        """The energy of each sample, (B,), differentiable in the state and in the parameters.

        Raises:
            TypeError: this field has none.
        """
        raise TypeError(f"{type(self).__name__} has no energy")

    def metric(self, state: Tensor) -> Tensor:
        """The diagonal of ``G``, (B, S): positive, and one constant number on all tokens (the
        damping's and the recirculation's energy are weighted by it). All ones unless overridden.
        """
        return torch.ones_like(state)

    def flow(self, state: Tensor, drive: Tensor) -> Tensor:
        """``ds/dt`` without damping and recirculation, (B, S).

        By automatic differentiation of the energy unless overridden.
        """
        return energy_flow(self, state, drive)

    @abstractmethod
    def features(self, state: Tensor) -> Tensor:
        """What the readout sees, (B, R)."""

    def nudge(self, state: Tensor, slope: Tensor) -> Tensor:
        """``(1/G) (dfeatures/ds)^T slope``, (B, S): a cost's slope at the features, as a flow.

        By automatic differentiation unless overridden.

        Args:
            state: (B, S).
            slope: (B, R), the cost's derivative by the features.
        """
        with torch.inference_mode(False), torch.enable_grad():
            point = state.clone().detach().requires_grad_()
            (back,) = torch.autograd.grad(self.features(point), point, slope.clone().detach())
        return back.detach() / self.metric(state)

    def eliminated(self, tokens: Tensor, drive: Tensor, state: Tensor) -> Tensor:
        """The flow of the tokens alone, (B, N, D), with hidden units at their own equilibrium.

        Its Jacobian is what the one-sided Lipschitz constant is measured of. Hidden units are held
        at those of ``state`` unless overridden, which is right for fields that have none.
        """
        hidden = self.split(state)[1]
        joined = torch.cat([tokens.flatten(1), hidden], dim=1)
        return self.split(self.flow(joined, drive))[0]

    def capped(self) -> list[Capped]:
        """The matrices whose spectral norms are to be capped after every step."""
        return []


def energy_flow(field: Field, state: Tensor, drive: Tensor) -> Tensor:
    """``-(1/G) dE/ds`` by automatic differentiation, whatever :meth:`Field.flow` does.

    Differentiable when gradients are recorded. Works under inference mode too.
    """
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        point = state if state.requires_grad else state.detach().requires_grad_()
        total = field.energy(point, drive).sum()
        (slope,) = torch.autograd.grad(total, point, create_graph=True)
        return -slope / field.metric(point)
    with torch.inference_mode(False), torch.enable_grad():
        point = state.clone().detach().requires_grad_()
        total = field.energy(point, drive.clone().detach()).sum()
        (slope,) = torch.autograd.grad(total, point)
        return (-slope / field.metric(point)).detach()


def build_field(found: type[Field], facts: dict[str, object]) -> Field:
    """Call a field's constructor with those of the facts that it names.

    Raises:
        ConfigError: it needs an argument that is not among them, or it refuses a value, or what
            it built does not have the tokens and the width that were asked for.
    """
    names, takes_any = accepted_names(found)
    parameters = inspect.signature(found).parameters
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in facts:
            raise ConfigError(
                "field",
                f"the constructor of {found.__qualname__} needs {name!r}",
                f"A field can have {', '.join(sorted(facts))}; give others a default",
            )
    given = {name: value for name, value in facts.items() if takes_any or name in names}
    try:
        field = found(**given)  # type: ignore[arg-type]
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            "field",
            f"the constructor of {found.__qualname__} fails with {', '.join(sorted(given))}: "
            f"{type(error).__name__}: {error}",
        ) from error
    if not {"tokens", "width", "size", "feature_size"} <= vars(field).keys():
        raise ConfigError(
            "field",
            f"the constructor of {found.__qualname__} does not call that of Field",
            "Begin it with super().__init__(tokens, width, size, feature_size)",
        )
    if (field.tokens, field.width) != (facts["tokens"], facts["width"]):
        raise ConfigError(
            "field",
            f"{found.__qualname__} has {field.tokens} tokens of width {field.width}, "
            f"expected {facts['tokens']} of {facts['width']}",
        )
    return field


def vet_field(field: Field) -> None:
    """Raise if a user's field does not keep what its interface promises.

    Looks at shapes, at whether samples are independent of each other, and at whether a flow
    written by hand is that of the energy. :class:`topotune.testing.EnergyContract` looks closer.

    Raises:
        PluginError: it does not, or its code fails; names the method and the rule.
    """
    kind = type(field).__name__

    def attempt(method: str, call: Callable[[], R]) -> R:
        try:
            return call()
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(
                f"field {kind}: {method}() fails on {SAMPLES} samples of {field.tokens} tokens of "
                f"width {field.width}: {type(error).__name__}: {error}. A field needs energy(), or "
                "conservative = False and a flow(); see topotune/tcep/README.md"
            ) from error

    def shaped(method: str, shape: tuple[int, ...], call: Callable[[], Tensor]) -> Tensor:
        value = attempt(method, call)
        found = attempt(method, lambda: tuple(value.shape))
        if found != shape:
            raise PluginError(
                f"field {kind}: {method}() must give shape {shape} for {SAMPLES} samples, got "
                f"{found}"
            )
        return value

    generator = torch.Generator().manual_seed(0)
    drive = torch.randn(SAMPLES, field.tokens, field.width, generator=generator)
    drive = drive.to(torch.get_default_dtype())
    whole = (SAMPLES, field.size)
    with torch.no_grad():
        state = shaped("initial", whole, lambda: field.initial(drive))
        state = state + 0.1 * torch.randn(state.shape, generator=generator).to(state)
        shaped("metric", whole, lambda: field.metric(state))
        shaped("features", (SAMPLES, field.feature_size), lambda: field.features(state))
        if field.conservative:
            shaped("energy", (SAMPLES,), lambda: field.energy(state, drive))
        flow = shaped("flow", whole, lambda: field.flow(state, drive))
        if not attempt("flow", lambda: _close(flow[:1], field.flow(state[:1], drive[:1]))):
            raise PluginError(
                f"field {kind}: flow() of a sample changes with the others in its batch; "
                "each sample must stand for itself"
            )
        if field.conservative and not attempt(
            "flow", lambda: _close(flow, energy_flow(field, state, drive))
        ):
            raise PluginError(
                f"field {kind}: flow() is not -(1/metric) times the gradient of energy(). "
                "Mend one of them, or leave flow() to automatic differentiation"
            )
    for item in attempt("capped", lambda: list(field.capped())):
        if not isinstance(item, Capped):
            raise PluginError(
                f"field {kind}: capped() must give Capped(weight, cap), got a {type(item).__name__}"
            )
        attempt("capped", lambda item=item: item.check(kind))  # type: ignore[misc]


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding; numbers that are not finite are judged in training, with their cause."""
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return True
    return bool((a - b).norm() <= APART * (a.norm() + b.norm()))
