"""The three couplings: what the current is, and how it moves the fields.

For ``uniform`` and ``exchange`` every update multiplies the fields by scalars and adds scalars, so
the fields never leave the span of what they started from: a step moves two or four float64 numbers
a tensor and reads its gradient two or three times, instead of rewriting two fields. ``local``
rewrites one tensor, the difference of the fields.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topotune.optim.fields import COMMON, Array, FieldBatch, Move, mean_of_products, scalars

NORM_FLOOR = 1e-12
"""Added to the gradient's norm that ``exchange`` divides by."""

ACCURACY = 2.0**-24
"""Largest absolute error of the polynomials: half a rounding of a float32 number near one."""

# A bound of tanh's derivative of order n + 1 over (n + 1)!, for the degrees n = 0, 1, 2, 3:
# the Taylor remainder at distance d is at most REMAINDERS[n] * d**(n + 1).
REMAINDERS = (1.0, 0.385, 1.0 / 3.0, 0.1725)


class LowRankFields(FieldBatch):
    """Couplings whose ``alpha - beta`` is, with two numbers a tensor, ``first*x + second*y``.

    ``x`` is the first tensor of the basis, ``y`` the second, or 1 where there is no second.
    """

    @abstractmethod
    def _gap_rows(self) -> Array:
        """(2, k): the two numbers of each tensor."""

    @abstractmethod
    def _ranges_of_basis(self) -> Array:
        """(2 or 4, k): middle and half width of the range of ``x``, then of ``y``."""

    def _read_constants(self) -> None:
        if self.on_cpu:
            self._ranges = self._ranges_of_basis().tolist()
            if self.basis_size == 1:
                self._ranges += [[1.0] * len(self.sizes), [0.0] * len(self.sizes)]

    def _combine(
        self, columns: list[list[Tensor]], first: list[Any], second: list[Any]
    ) -> list[Tensor]:
        """``first*x + second*y`` of some tensors, fresh; ``columns`` as in ``shaped``."""
        gaps = torch._foreach_mul(columns[0], first)
        rest = second if self.basis_size == 1 else torch._foreach_mul(columns[1], second)
        torch._foreach_add_(gaps, rest)
        return list(gaps)

    def _gaps(self, factor: float) -> list[Tensor]:
        first, second = self.weights(self._gap_rows() * factor)
        return self._combine(self.shaped, first, second)

    def add_correction(
        self, parameters: list[Tensor], weight: float, held: Sequence[Tensor] = ()
    ) -> None:
        """See :meth:`FieldBatch.add_correction`.

        The gap of a tensor spreads little around its middle: with ``tanh_cos`` it is nearly
        constant for weights of usual size, and ``a`` vanishes under large gradients. On the CPU,
        where the spread is known without waiting, tanh is then a polynomial of low degree.
        """
        if held or not self.large or not self.on_cpu or self.dtype is not torch.float32:
            super().add_correction(parameters, weight, held)
            return
        first, second = self.weights(self._gap_rows())
        others = [i for i in range(len(parameters)) if i not in self.large]
        for i in self.large:
            middle_x, reach_x, middle_y, reach_y = (row[i] for row in self._ranges)
            # The ranges of x and y are taken as independent.
            middle = first[i] * middle_x + second[i] * middle_y
            degree = degree_for(abs(first[i]) * reach_x + abs(second[i]) * reach_y)
            if degree is None:
                others.append(i)
            elif degree == 0:
                parameters[i].add_(weight * math.tanh(middle))
            else:
                x, series = self.shaped[0][i], taylor(middle, degree)
                if self.basis_size == 1:  # a polynomial of x itself: the gap need not be formed
                    moved = polynomial(x, shifted(series, first[i], middle_x))
                else:
                    gap = torch.mul(x, first[i]).add_(self.shaped[1][i], alpha=second[i])
                    moved = polynomial(gap, shifted(series, 1.0, middle))
                parameters[i].add_(moved, alpha=weight)
        if others:
            factor = self._tanh_factor(sum(self.sizes[i] for i in others))
            columns = [[column[i] for i in others] for column in self.shaped]
            numbers = ([factor * row[i] for i in others] for row in (first, second))
            gaps = self._combine(columns, *numbers)
            self._add_tanh([parameters[i] for i in others], gaps, weight, factor)


class UniformFields(LowRankFields):
    """``alpha = a*alpha0 + b`` and ``beta = a*beta0 - b`` with scalars ``a, b`` from ``(1, 0)``.

    The paper's equations read literally: ``J = <alpha-beta, g>`` is one number a tensor.
    The state keeps ``gap0 = alpha0 - beta0``, which the steps need, and ``alpha0``; the constants
    are ``mean(alpha0^2 + beta0^2) / 2``, ``mean(gap0)``, and the middle of ``gap0``'s range with
    half its width.
    """

    tensors = ("gap0", "alpha0")
    basis_size = 1
    coefficients = 2
    scalar_count = COMMON + coefficients + 4

    @classmethod
    def start(cls, alpha: Tensor, beta: Tensor) -> dict[str, Tensor]:
        """See :meth:`FieldBatch.start`."""
        half_square = 0.5 * (mean_of_products(alpha, alpha) + mean_of_products(beta, beta))
        gap = alpha - beta
        row = scalars(alpha, beta, 1.0, 0.0, half_square, gap.double().mean(), *value_range(gap))
        return {"gap0": gap, "alpha0": alpha, "scalars": row}

    @staticmethod
    def materialise(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See :meth:`FieldBatch.materialise`."""
        a, b = state["scalars"][COMMON : COMMON + 2].unbind(0)
        alpha0 = state["alpha0"]
        return alpha0 * a + b, (alpha0 - state["gap0"]) * a - b

    def _move(self, gradients: Sequence[Tensor], move: Move) -> tuple[Array, Array, Array]:
        measured = list(map(torch.dot, self.basis[0], gradients))
        measured += map(Tensor.sum, gradients)
        product, total = self._array(measured, 2)
        self.bad = ~self.xp.isfinite(total)
        a, b = self.coefficient_rows
        half_square, gap_mean = self.constants[:2]
        current = a * product + 2.0 * b * total
        moved = self.coefficient_rows * move.keep
        moved[1] += move.rate * current
        a, b = moved
        # mean((a*alpha0 + b)^2 + (a*beta0 - b)^2) / 2
        energy = a * (a * half_square + b * gap_mean) + b * b
        return moved, energy, current

    def _gap_rows(self) -> Array:
        rows = self.coefficient_rows + 0.0
        rows[1] *= 2.0
        return rows  # a and 2b

    def _ranges_of_basis(self) -> Array:
        return self.constants[2:]


class ExchangeFields(LowRankFields):
    """``alpha = c11*alpha0 + c12*beta0`` and ``beta = c21*alpha0 + c22*beta0``.

    The coupling of the published 1.0 release: ``J = <alpha-beta, g> / (|g| + 1e-12)`` and the
    fields rotate into each other. The coefficients stand in the order 11, 12, 21, 22; the
    constants are the halved means of ``alpha0^2`` and ``beta0^2``, the mean of ``alpha0*beta0``,
    and of the range of ``alpha0`` and of ``beta0`` the middle and half the width.
    """

    tensors = ("alpha0", "beta0")
    basis_size = 2
    coefficients = 4
    scalar_count = COMMON + coefficients + 7

    @classmethod
    def start(cls, alpha: Tensor, beta: Tensor) -> dict[str, Tensor]:
        """See :meth:`FieldBatch.start`."""
        squares = [0.5 * mean_of_products(field, field) for field in (alpha, beta)]
        product = mean_of_products(alpha, beta)
        ranges = (*value_range(alpha), *value_range(beta))
        row = scalars(alpha, beta, 1.0, 0.0, 0.0, 1.0, *squares, product, *ranges)
        return {"alpha0": alpha, "beta0": beta, "scalars": row}

    @staticmethod
    def materialise(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See :meth:`FieldBatch.materialise`."""
        c11, c12, c21, c22 = state["scalars"][COMMON : COMMON + 4].unbind(0)
        alpha0, beta0 = state["alpha0"], state["beta0"]
        return alpha0 * c11 + beta0 * c12, alpha0 * c21 + beta0 * c22

    def _move(self, gradients: Sequence[Tensor], move: Move) -> tuple[Array, Array, Array]:
        measured = list(map(torch.dot, self.basis[0], gradients))
        measured += map(torch.dot, self.basis[1], gradients)
        measured += map(torch.dot, gradients, gradients)
        measured_rows = self._array(measured, 3)
        square = measured_rows[2]
        self.bad = ~self.xp.isfinite(square)
        old = self.coefficient_rows
        of_alpha, of_beta = old[:2], old[2:]
        product = ((of_alpha - of_beta) * measured_rows[:2]).sum(0)
        current = product / (self.xp.sqrt(square) + NORM_FLOOR)
        turn = move.rate * current
        moved = old * move.keep
        moved[:2] += turn * of_beta
        moved[2:] -= turn * of_alpha
        c11, c12, c21, c22 = moved
        alpha_square, beta_square, cross = self.constants[:3]
        energy = (c11 * c11 + c21 * c21) * alpha_square
        energy += (c12 * c12 + c22 * c22) * beta_square
        energy += (c11 * c12 + c21 * c22) * cross
        return moved, energy, current

    def _gap_rows(self) -> Array:
        return self.coefficient_rows[:2] - self.coefficient_rows[2:]

    def _ranges_of_basis(self) -> Array:
        return self.constants[3:]


class LocalFields(FieldBatch):
    """``J_i = (alpha_i - beta_i) g_i``, element by element: the paper's dot read elementwise.

    The sum ``alpha + beta`` only ever shrinks by ``1 - eta`` and is scaled by the control, so it
    is a scalar times its start; the difference is a full tensor that every step multiplies by
    ``1 - eta + 2 (eta/mu0) g``. The state keeps ``gap`` and ``sum0``; the coefficients are the
    factor that the control still owes to ``gap`` (folded into the next step's first pass) and the
    factor of ``sum0``; the constants are ``mean(sum0^2) / 4`` and the number of elements.
    """

    tensors = ("gap", "sum0")
    basis_size = 1
    coefficients = 2
    scalar_count = COMMON + coefficients + 2

    @classmethod
    def start(cls, alpha: Tensor, beta: Tensor) -> dict[str, Tensor]:
        """See :meth:`FieldBatch.start`."""
        total = alpha + beta
        quarter_square = 0.25 * mean_of_products(total, total)
        row = scalars(alpha, beta, 1.0, 1.0, quarter_square, float(alpha.numel()))
        return {"gap": alpha - beta, "sum0": total, "scalars": row}

    @staticmethod
    def materialise(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See :meth:`FieldBatch.materialise`."""
        owed, shrink = state["scalars"][COMMON : COMMON + 2].unbind(0)
        half_gap, half_sum = state["gap"] * (0.5 * owed), state["sum0"] * (0.5 * shrink)
        return half_sum + half_gap, half_sum - half_gap

    def _move(self, gradients: Sequence[Tensor], move: Move) -> tuple[Array, Array, Array]:
        """See :meth:`FieldBatch._move`; rewrites ``gap`` where the gradient is finite."""
        flat = self.basis[0]
        owed = self.coefficient_rows[0]
        quarter_square, count = self.constants
        steps = torch._foreach_mul(flat, list(gradients))
        (norms,) = self._array(list(torch._foreach_norm(steps, 1)), 1)
        current = norms * owed / count
        growth, factor = 2.0 * move.rate / move.keep, owed * move.keep
        # With moves below this bound a gap that shrinks by 1 - eta in every step stays finite,
        # and so does its energy in float64.
        largest = min((1.0 - move.keep) * torch.finfo(self.dtype).max / 4.0, 1e140)
        stopped = ~(norms * (1.0 + factor) < largest / max(1.0, abs(growth)))
        self.bad, surplus = stopped, 0.0
        if not self.on_cpu or stopped.any():
            (total,) = self._array([g.sum() for g in gradients], 1)
            self.bad = stopped & ~self.xp.isfinite(total)
            surplus = self.xp.where(stopped & ~self.bad, math.inf, 0.0)
            factor = self.xp.where(stopped, 1.0, factor)
            # A gap that may not move gets steps of zero, NaN included.
            for place, step in enumerate(steps):
                if not self.on_cpu:
                    step.masked_fill_(stopped[place], 0.0)
                elif stopped[place]:
                    step.zero_()
        # gap becomes (1 - eta)(alpha - beta) + 2 (eta/mu0) J, where it may move
        torch._foreach_add_(flat, steps, alpha=growth)
        torch._foreach_mul_(flat, self._factors(factor))
        moved = self.coefficient_rows * move.keep
        moved[0] = 1.0
        # (alpha^2 + beta^2) / 2 = (gap^2 + sum^2) / 4
        energy = 0.25 * self._squares(flat) / count + moved[1] * moved[1] * quarter_square
        return moved, energy + surplus, current

    def _squares(self, flat: list[Tensor]) -> Array:
        """(k,) sums of squares of the gaps, which single precision may not hold."""
        if not self.on_cpu:
            (norms,) = self._array(list(torch._foreach_norm(flat, 2, dtype=torch.float64)), 1)
            return norms * norms
        (squares,) = self._array(list(map(torch.dot, flat, flat)), 1)
        for place in np.isinf(squares).nonzero()[0]:
            squares[place] = flat[place].double().square().sum().item()
        return squares

    def _gaps(self, factor: float) -> list[Tensor]:
        (owed,) = self.weights(self.coefficient_rows[:1] * factor)
        return list(torch._foreach_mul(self.shaped[0], owed))


COUPLINGS: dict[str, type[FieldBatch]] = {
    "uniform": UniformFields,
    "exchange": ExchangeFields,
    "local": LocalFields,
}


def value_range(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and half width of the range of a tensor's elements, 0-d float64."""
    low, high = (end.double() for end in torch.aminmax(tensor))
    return 0.5 * (low + high), 0.5 * (high - low)


def degree_for(reach: float) -> int | None:
    """The lowest degree whose Taylor polynomial of tanh is accurate up to a distance of ``reach``.

    Returns:
        A degree from 0 to 3; None if none of them is accurate enough, or ``reach`` is NaN.
    """
    for degree, bound in enumerate(REMAINDERS):
        if bound * reach ** (degree + 1) <= ACCURACY:
            return degree
    return None


def taylor(centre: float, degree: int) -> list[float]:
    """Taylor coefficients of tanh at ``centre``, constant first."""
    t = math.tanh(centre)
    slope = 1.0 - t * t
    return [t, slope, -t * slope, slope * (t * t - slope / 2.0) * 2.0 / 3.0][: degree + 1]


def shifted(coefficients: list[float], scale: float, middle: float) -> list[float]:
    """Coefficients in ``x`` of the polynomial in ``scale * (x - middle)``, constant first."""
    result = [0.0] * len(coefficients)
    for coefficient in reversed(coefficients):  # Horner's scheme on polynomials in x
        stepped = [0.0] * len(result)
        for power, value in enumerate(result):
            stepped[power] -= scale * middle * value
            if power + 1 < len(result):
                stepped[power + 1] += scale * value
        stepped[0] += coefficient
        result = stepped
    return result


def polynomial(tensor: Tensor, coefficients: list[float]) -> Tensor:
    """The polynomial of a tensor, fresh; at least degree 1, constant first.

    One pass for the two highest coefficients and two for each other one.
    """
    first = torch.tensor(coefficients[-2], dtype=tensor.dtype)
    value = torch.add(first, tensor, alpha=coefficients[-1])
    for coefficient in reversed(coefficients[:-2]):
        value.mul_(tensor).add_(coefficient)
    return value
