"""The couplings ``uniform`` and ``exchange`` in their exact low-rank form.

Every update of these two multiplies the fields by scalars and adds scalars, so the fields never
leave the span of what they started from: a step moves two or four float64 numbers a tensor and
reads its gradient two or three times, instead of rewriting two fields.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topotune.optim._fields import COMMON, Array, FieldBatch, Move, mean_of_products, scalars
from topotune.optim._tanh import degree_for, polynomial, shifted, taylor

NORM_FLOOR = 1e-12
"""Added to the gradient's norm that ``exchange`` divides by."""


def value_range(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and half width of the range of a tensor's elements, 0-d float64."""
    low, high = (end.double() for end in torch.aminmax(tensor))
    return 0.5 * (low + high), 0.5 * (high - low)


class LowRankFields(FieldBatch):
    """What both share: a gap that is a combination of constants, and its correction."""

    @abstractmethod
    def gap_rows(self) -> Array:
        """(2, k): the two numbers a tensor that combine its constants to ``alpha - beta``."""

    @abstractmethod
    def combine(
        self, columns: list[list[Tensor]], first: list[Any], second: list[Any]
    ) -> list[Tensor]:
        """``alpha - beta`` of some tensors, fresh.

        Args:
            columns: their constants, as in ``shaped``.
            first, second: their two numbers.
        """

    @abstractmethod
    def spread(self, place: int, first: float, second: float) -> tuple[float, float]:
        """Middle and half width of an interval that holds all elements of ``alpha - beta``."""

    @abstractmethod
    def series(self, place: int, first: float, second: float, taylor_series: list[float]) -> Tensor:
        """The polynomial of ``alpha - beta`` around the middle of its spread; fresh."""

    def gaps(self, factor: float) -> list[Tensor]:
        """See :meth:`FieldBatch.gaps`."""
        first, second = self.weights(self.gap_rows() * factor)
        return self.combine(self.shaped, first, second)

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
        first, second = self.weights(self.gap_rows())
        others = [i for i in range(len(parameters)) if i not in self.large]
        for i in self.large:
            parameter = parameters[i]
            middle, reach = self.spread(i, first[i], second[i])
            degree = degree_for(reach)
            if degree is None:
                others.append(i)
            elif degree == 0:
                parameter.add_(weight * math.tanh(middle))
            else:
                moved = self.series(i, first[i], second[i], taylor(middle, degree))
                parameter.add_(moved, alpha=weight)
        if others:
            targets = [parameters[i] for i in others]
            factor = self.tanh_factor(sum(self.sizes[i] for i in others))
            gaps = self.combine(
                [[column[i] for i in others] for column in self.shaped],
                [factor * first[i] for i in others],
                [factor * second[i] for i in others],
            )
            self.add_tanh(targets, gaps, weight, factor)


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

    def _read_constants(self) -> None:
        self.middles, self.reaches = self.constants[2:].tolist() if self.on_cpu else ([], [])

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

    def move(self, gradients: Sequence[Tensor], move: Move) -> tuple[Array, Array, Array]:
        """See :meth:`FieldBatch.move`."""
        measured = list(map(torch.dot, self.basis[0], gradients))
        measured += map(Tensor.sum, gradients)
        product, total = self.array(measured, 2)
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

    def gap_rows(self) -> Array:
        """See :meth:`LowRankFields.gap_rows`: ``a`` and ``2b``."""
        rows = self.coefficient_rows + 0.0
        rows[1] *= 2.0
        return rows

    def combine(
        self, columns: list[list[Tensor]], first: list[Any], second: list[Any]
    ) -> list[Tensor]:
        """See :meth:`LowRankFields.combine`: ``a*gap0 + 2b``."""
        gaps = torch._foreach_mul(columns[0], first)
        torch._foreach_add_(gaps, second)
        return list(gaps)

    def spread(self, place: int, first: float, second: float) -> tuple[float, float]:
        """See :meth:`LowRankFields.spread`."""
        return first * self.middles[place] + second, abs(first) * self.reaches[place]

    def series(self, place: int, first: float, second: float, taylor_series: list[float]) -> Tensor:
        """See :meth:`LowRankFields.series`; a polynomial of ``gap0`` itself."""
        in_gap0 = shifted(taylor_series, first, self.middles[place])
        return polynomial(self.shaped[0][place], in_gap0)


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

    def _read_constants(self) -> None:
        self.ranges = self.constants[3:].reshape(2, 2, -1).tolist() if self.on_cpu else []

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

    def move(self, gradients: Sequence[Tensor], move: Move) -> tuple[Array, Array, Array]:
        """See :meth:`FieldBatch.move`."""
        measured = list(map(torch.dot, self.basis[0], gradients))
        measured += map(torch.dot, self.basis[1], gradients)
        measured += map(torch.dot, gradients, gradients)
        measured_rows = self.array(measured, 3)
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

    def gap_rows(self) -> Array:
        """See :meth:`LowRankFields.gap_rows`: ``c11 - c21`` and ``c12 - c22``."""
        return self.coefficient_rows[:2] - self.coefficient_rows[2:]

    def combine(
        self, columns: list[list[Tensor]], first: list[Any], second: list[Any]
    ) -> list[Tensor]:
        """See :meth:`LowRankFields.combine`: ``first*alpha0 + second*beta0``."""
        gaps = torch._foreach_mul(columns[0], first)
        rest = torch._foreach_mul(columns[1], second)
        torch._foreach_add_(gaps, rest)
        return list(gaps)

    def spread(self, place: int, first: float, second: float) -> tuple[float, float]:
        """See :meth:`LowRankFields.spread`; the two fields' ranges taken as independent."""
        of_alpha, of_beta = self.ranges[0], self.ranges[1]
        middle = first * of_alpha[0][place] + second * of_beta[0][place]
        return middle, abs(first) * of_alpha[1][place] + abs(second) * of_beta[1][place]

    def series(self, place: int, first: float, second: float, taylor_series: list[float]) -> Tensor:
        """See :meth:`LowRankFields.series`."""
        middle, _ = self.spread(place, first, second)
        gap = torch.mul(self.shaped[0][place], first).add_(self.shaped[1][place], alpha=second)
        return polynomial(gap, shifted(taylor_series, 1.0, middle))
