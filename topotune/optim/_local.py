"""The coupling ``local``: the paper's dot read as an elementwise product."""

from __future__ import annotations

from collections.abc import Sequence

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
        (total,) = self.array([g.sum() for g in gradients], 1)
        self.bad = ~self.xp.isfinite(total)
        owed = self.coefficient_rows[0]
        quarter_square, count = self.constants
        # gap becomes (1 - eta)(alpha - beta), where it may move
        torch._foreach_mul_(flat, self.factors(self.xp.where(self.bad, 1.0, owed * move.keep)))
        steps = torch._foreach_mul(flat, list(gradients))
        self._erase(steps)
        (norms,) = self.array(list(torch._foreach_norm(steps, 1)), 1)
        current = norms / (count * move.keep)
        torch._foreach_add_(flat, steps, alpha=2.0 * move.rate / move.keep)
        (squares,) = self.array(list(map(torch.dot, flat, flat)), 1)
        moved = self.coefficient_rows * move.keep
        moved[0] = 1.0
        # (alpha^2 + beta^2) / 2 = (gap^2 + sum^2) / 4
        energy = 0.25 * squares / count + moved[1] * moved[1] * quarter_square
        return moved, energy, current

    def _erase(self, steps: Sequence[Tensor]) -> None:
        """Zero the steps of tensors whose gradient is not finite, NaN included."""
        if self.on_cpu:
            for place in self.bad.nonzero()[0]:
                steps[place].zero_()
        else:
            for step, wrong in zip(steps, self.bad.unbind(0), strict=True):
                step.masked_fill_(wrong, 0.0)

    def gaps(self, factor: float) -> list[Tensor]:
        """See :meth:`FieldBatch.gaps`."""
        (owed,) = self.weights(self.coefficient_rows[:1] * factor)
        return list(torch._foreach_mul(self.shaped[0], owed))
