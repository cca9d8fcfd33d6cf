"""The coupling ``local``: the paper's dot read as an elementwise product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from topotune.optim._fields import COMMON, Array, FieldBatch, Move, mean_of_products, scalars


class LocalFields(FieldBatch):
    """``J_i = (alpha_i - beta_i) g_i``, element by element.

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

    def move(self, gradients: Sequence[Tensor], move: Move) -> tuple[Array, Array, Array]:
        """See :meth:`FieldBatch.move`; rewrites ``gap`` where the gradient is finite."""
        flat = self.basis[0]
        owed = self.coefficient_rows[0]
        quarter_square, count = self.constants
        steps = torch._foreach_mul(flat, list(gradients))
        (norms,) = self.array(list(torch._foreach_norm(steps, 1)), 1)
        current = norms * owed / count
        growth, factor = 2.0 * move.rate / move.keep, owed * move.keep
        # With moves below this bound a gap that shrinks by 1 - eta in every step stays finite,
        # and so does its energy in float64.
        largest = min((1.0 - move.keep) * torch.finfo(self.dtype).max / 4.0, 1e140)
        stopped = ~(norms * (1.0 + factor) < largest / max(1.0, abs(growth)))
        self.bad, surplus = stopped, 0.0
        if not self.on_cpu or stopped.any():
            (total,) = self.array([g.sum() for g in gradients], 1)
            self.bad = stopped & ~self.xp.isfinite(total)
            surplus = self.xp.where(stopped & ~self.bad, math.inf, 0.0)
            factor = self.xp.where(stopped, 1.0, factor)
            self._erase(steps, stopped)
        # gap becomes (1 - eta)(alpha - beta) + 2 (eta/mu0) J, where it may move
        torch._foreach_add_(flat, steps, alpha=growth)
        torch._foreach_mul_(flat, self.factors(factor))
        moved = self.coefficient_rows * move.keep
        moved[0] = 1.0
        # (alpha^2 + beta^2) / 2 = (gap^2 + sum^2) / 4
        energy = 0.25 * self._squares(flat) / count + moved[1] * moved[1] * quarter_square
        return moved, energy + surplus, current

    def _squares(self, flat: list[Tensor]) -> Array:
        """(k,) sums of squares of the gaps, which single precision may not hold."""
        if self.on_cpu:
            (squares,) = self.array(list(map(torch.dot, flat, flat)), 1)
            for place in np.isinf(squares).nonzero()[0]:
                squares[place] = flat[place].double().square().sum().item()
        else:
            (norms,) = self.array(list(torch._foreach_norm(flat, 2, dtype=torch.float64)), 1)
            squares = norms * norms
        return squares

    def _erase(self, steps: Sequence[Tensor], places: Array) -> None:
        """Zero the steps of some tensors, NaN included: those whose gap may not move."""
        if self.on_cpu:
            for place in places.nonzero()[0]:
                steps[place].zero_()
        else:
            for step, wrong in zip(steps, places.unbind(0), strict=True):
                step.masked_fill_(wrong, 0.0)

    def gaps(self, factor: float) -> list[Tensor]:
        """See :meth:`FieldBatch.gaps`."""
        (owed,) = self.weights(self.coefficient_rows[:1] * factor)
        return list(torch._foreach_mul(self.shaped[0], owed))
