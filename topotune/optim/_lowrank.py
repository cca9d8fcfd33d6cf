"""The couplings ``uniform`` and ``exchange`` in their exact low-rank form.

Every update of these two multiplies the fields by scalars and adds scalars, so the fields never
leave the span of what they started from: a step moves two or four float64 numbers a tensor and
reads its gradient two or three times, instead of rewriting two fields.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from topotune.optim._fields import COMMON, LARGE, Array, FieldBatch, Move, mean_of_products, scalars
from topotune.optim._tanh import degree_for, polynomial, shifted, taylor

NORM_FLOOR = 1e-12
"""Added to the gradient's norm that ``exchange`` divides by."""


class UniformFields(FieldBatch):
    """``alpha = a*alpha0 + b`` and ``beta = a*beta0 - b`` with scalars ``a, b`` from ``(1, 0)``.

    The paper's equations read literally: ``J = <alpha-beta, g>`` is one number a tensor.
    The state keeps ``gap0 = alpha0 - beta0``, which the steps need, and ``alpha0``; the constants
    are ``mean(alpha0^2 + beta0^2) / 2``, ``mean(gap0)``, and the middle of ``gap0``'s range with
    half its width.
    """

    tensors = ("gap0", "alpha0")
    basis_size = 1
    coefficients = 2

    def __init__(self, states: Sequence[dict[str, Tensor]]) -> None:
        super().__init__(states)
        self.middles, self.reaches = self.constants[2:].tolist() if self.on_cpu else ([], [])

    @classmethod
    def start(cls, alpha: Tensor, beta: Tensor) -> dict[str, Tensor]:
        """See :meth:`FieldBatch.start`."""
        half_square = 0.5 * (mean_of_products(alpha, alpha) + mean_of_products(beta, beta))
        gap = alpha - beta
        low, high = (end.double() for end in torch.aminmax(gap))
        spread = (0.5 * (low + high), 0.5 * (high - low))
        row = scalars(alpha, beta, 1.0, 0.0, half_square, gap.double().mean(), *spread)
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
        measured += [g.sum() for g in gradients]
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

    def gaps(self, factor: float) -> list[Tensor]:
        """See :meth:`FieldBatch.gaps`: ``a*gap0 + 2b``."""
        a, twice_b = self.weights(self.gap_rows() * factor)
        gaps = torch._foreach_mul(self.shaped[0], a)
        torch._foreach_add_(gaps, twice_b)
        return list(gaps)

    def gap_rows(self) -> Array:
        """``a`` and ``2b`` as (2, k)."""
        rows = self.coefficient_rows + 0.0
        rows[1] *= 2.0
        return rows

    def add_correction(self, parameters: list[Tensor], weight: float) -> None:
        """See :meth:`FieldBatch.add_correction`.

        The gaps of a tensor spread little around their middle: ``gap0`` is nearly constant for
        weights of usual size, and ``a`` vanishes under large gradients. On the CPU, where the
        spread is known without waiting, tanh is then a polynomial of low degree in ``gap0``.
        """
        if not self.on_cpu or self.dtype is not torch.float32:
            super().add_correction(parameters, weight)
            return
        a, twice_b = self.weights(self.gap_rows())
        others = []
        for i, (parameter, gap0) in enumerate(zip(parameters, self.shaped[0], strict=True)):
            degree = degree_for(abs(a[i]) * self.reaches[i]) if gap0.numel() >= LARGE else None
            if degree is None:
                others.append(i)
                continue
            series = taylor(a[i] * self.middles[i] + twice_b[i], degree)
            if degree == 0:
                parameter.add_(weight * series[0])
            else:
                series = shifted(series, a[i], self.middles[i])
                parameter.add_(polynomial(gap0, series), alpha=weight)
        if others:
            targets = [parameters[i] for i in others]
            factor = self.tanh_factor(targets)
            gaps = torch._foreach_mul(
                [self.shaped[0][i] for i in others], [factor * a[i] for i in others]
            )
            torch._foreach_add_(gaps, [factor * twice_b[i] for i in others])
            self.add_tanh(targets, list(gaps), weight, factor)


class ExchangeFields(FieldBatch):
    """``alpha = c11*alpha0 + c12*beta0`` and ``beta = c21*alpha0 + c22*beta0``.

    The coupling of the published 1.0 release: ``J = <alpha-beta, g> / (|g| + 1e-12)`` and the
    fields rotate into each other. The coefficients stand in the order 11, 12, 21, 22; the
    constants are the halved means of ``alpha0^2`` and ``beta0^2`` and the mean of
    ``alpha0*beta0``.
    """

    tensors = ("alpha0", "beta0")
    basis_size = 2
    coefficients = 4

    @classmethod
    def start(cls, alpha: Tensor, beta: Tensor) -> dict[str, Tensor]:
        """See :meth:`FieldBatch.start`."""
        squares = [0.5 * mean_of_products(field, field) for field in (alpha, beta)]
        product = mean_of_products(alpha, beta)
        row = scalars(alpha, beta, 1.0, 0.0, 0.0, 1.0, *squares, product)
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
        alpha_square, beta_square, cross = self.constants
        energy = (c11 * c11 + c21 * c21) * alpha_square
        energy += (c12 * c12 + c22 * c22) * beta_square
        energy += (c11 * c12 + c21 * c22) * cross
        return moved, energy, current

    def gaps(self, factor: float) -> list[Tensor]:
        """See :meth:`FieldBatch.gaps`: ``(c11-c21)*alpha0 + (c12-c22)*beta0``."""
        difference = self.coefficient_rows[:2] - self.coefficient_rows[2:]
        of_alpha, of_beta = self.weights(difference * factor)
        gaps = torch._foreach_mul(self.shaped[0], of_alpha)
        torch._foreach_add_(gaps, torch._foreach_mul(self.shaped[1], of_beta))
        return list(gaps)
