"""Anderson acceleration of the damped Euler map, for each sample of a batch by itself.

Anderson (1965), type II: the next state is the Euler step less the combination of the last
differences that best cancels the flow. Walker and Ni, SIAM J. Numer. Anal. 49 (2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from topotune.tcep import stepping
from topotune.tcep.stepping import Flow, Stepper

HISTORY = 5
"""Differences that are combined."""

GROWTH = 2.0
"""An accelerated step is taken back where it leaves more than this multiple of the least norm."""

REST = HISTORY
"""Euler steps after a failure: enough to replace all older differences."""


class Anderson(Stepper):
    """See the module. Two things send a sample back to damped Euler steps for a while.

    Where its last step went along an expanding direction of the flow, there is a saddle of the
    energy nearby: acceleration would be drawn in, again and again, and only the plain flow leads
    past it. And where an accelerated step made the flow much larger, or NaN, the sample
    also goes back to where it was, and rests twice as long at every further time; a solve for
    the combination that failed shows in that way too. Neither happens where the flow contracts.

    Args:
        dt: step of the Euler map.
        state: (B, S), of which the batch, device and dtype are taken.
    """

    def __init__(self, dt: float, state: Tensor) -> None:
        self.time_step = dt
        batch, size = state.shape
        limits = torch.finfo(state.dtype)
        # Products are taken in the state's precision: below its rounding, a pivot of the scaled
        # matrix says nothing.
        self._ridge, self._tiny = 32 * limits.eps, limits.tiny
        # Differences of the flow; after them, the present flow.
        self._forces = state.new_zeros(batch, HISTORY + 1, size)
        self._moves = state.new_zeros(batch, HISTORY, size)  # differences of the Euler map
        # Products of the differences, scaled to length 1: the ridge then means the same for old,
        # long ones and new, short ones. Scale 0: a difference that there is not yet.
        self._scale = state.new_zeros(batch, HISTORY, dtype=torch.float64)
        self._matrix = torch.zeros_like(self._scale).diag_embed()
        self._matrix.diagonal(dim1=1, dim2=2).fill_(1 + self._ridge)
        self._least = state.new_full((batch,), torch.inf)
        self._everyone = state.new_ones(batch, dtype=torch.bool)
        self._accelerated = ~self._everyone
        self._rest = torch.zeros_like(self._least)  # Euler steps still to take
        self._pause = torch.full_like(self._least, REST)
        self._before: tuple[Tensor, Tensor, Tensor] | None = None  # state, force, norm
        self._move = torch.empty_like(state)
        self._count = 0
        self._blind = stepping.queues(state.device)  # no look whether a rare case is there
        self._failures = self._blind  # whether there may have been any

    def excused(self) -> Tensor | None:
        """Those whose last step was accelerated."""
        return None if self._count == 0 else self._accelerated

    def step(
        self, flow: Flow, state: Tensor, force: Tensor, norm: Tensor, live: Tensor | None
    ) -> tuple[Tensor, int]:
        """An accelerated step, or Euler's where there is nothing to accelerate with."""
        resting: Tensor | None = None
        if self._before is None:
            torch.mul(force, self.time_step, out=self._move)
        else:
            state, force, norm = self._judge(state, force, norm)
            slot = self._count % HISTORY
            self._count += 1
            change = torch.sub(force, self._before[1], out=self._forces[:, slot])
            torch.add(self._move, change, alpha=self.time_step, out=self._moves[:, slot])
            self._forces[:, HISTORY] = force
            self._watch(change)
            weights = self._combination(slot).to(force.dtype)
            if self._failures:
                resting = self._rest > 0
                self._rest = (self._rest - 1).clamp_min(0)
                weights = weights.masked_fill(resting.unsqueeze(1), 0.0)
            torch.baddbmm(
                force.unsqueeze(1),
                weights.unsqueeze(1),
                self._moves,
                beta=self.time_step,
                alpha=-1,
                out=self._move.unsqueeze(1),
            )
            self._accelerated = self._everyone if resting is None else ~resting
            if live is not None:
                self._accelerated = self._accelerated & live
        # On the way out, a norm that has been reached before is no measure.
        self._least = torch.fmin(self._least, norm)
        if resting is not None:
            self._least = torch.where(resting, norm, self._least)
        self._before = state, force, norm
        new = state + self._move
        if live is not None:
            new = torch.where(live.unsqueeze(1), new, state)
        return new, 0

    def _grown(self, norm: Tensor) -> Tensor:
        # Not "norm > ...", which is false of a NaN.
        return self._accelerated & ~(norm <= GROWTH * self._least)

    def _judge(self, state: Tensor, force: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take failed steps back: the state, force and norm to go on from."""
        if not self._blind and bool((norm <= GROWTH * self._least).all()):
            return state, force, norm  # by far the most frequent case, at two small steps
        assert self._before is not None
        grown = self._grown(norm)
        column = grown.unsqueeze(1)
        state = torch.where(column, self._before[0], state)
        force = torch.where(column, self._before[1], force)
        norm = torch.where(grown, self._before[2], norm)
        self._move.masked_fill_(column, 0.0)
        self._rest = torch.where(grown, self._pause, self._rest)
        self._pause = torch.where(grown, 2 * self._pause, self._pause)
        self._failures = True
        return state, force, norm

    def _watch(self, change: Tensor) -> None:
        """Send samples to rest whose last step went along an expanding direction."""
        expanding = torch.linalg.vecdot(self._move, change) > 0
        if self._blind or bool(expanding.any()):
            self._rest = torch.where(expanding, self._rest.clamp_min(REST), self._rest)
            self._failures = True

    def _combination(self, slot: int) -> Tensor:
        """The weights of the differences that best cancel the force, (B, HISTORY), float64.

        ``slot`` is the place of the new difference.
        """
        pair = self._forces[:, slot :: HISTORY - slot]  # the new difference and the force
        products = torch.bmm(pair, self._forces[:, :HISTORY].mT).double()
        length = products[:, 0, slot].clamp_min(self._tiny).rsqrt()
        self._scale[:, slot] = length
        row = products[:, 0] * (self._scale * length.unsqueeze(1))
        self._matrix[:, slot] = row
        self._matrix[:, :, slot] = row
        self._matrix[:, slot, slot] = 1 + self._ridge
        factor, _ = torch.linalg.cholesky_ex(self._matrix)
        right = (self._scale * products[:, 1]).unsqueeze(2)
        return self._scale * torch.cholesky_solve(right, factor).squeeze(2)

    def last(self, state: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Without the last step where it failed."""
        if self._before is None:
            return state, norm
        grown = self._grown(norm)
        state = torch.where(grown.unsqueeze(1), self._before[0], state)
        return state, torch.where(grown, self._before[2], norm)

    def keep(self, index: Tensor) -> None:
        """Keep the differences of some samples."""
        self._forces, self._moves = self._forces[index], self._moves[index]
        self._scale, self._matrix = self._scale[index], self._matrix[index]
        self._least, self._accelerated = self._least[index], self._accelerated[index]
        self._everyone = self._everyone[index]
        self._rest, self._pause = self._rest[index], self._pause[index]
        self._move = self._move[index]
        if self._before is not None:
            state, force, norm = self._before
            self._before = state[index], force[index], norm[index]
