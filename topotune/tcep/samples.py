"""The samples of a relaxation: which still move, which are finished, and the orbit of a period."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from topotune.tcep import stepping
from topotune.tcep.recirculation import Memory
from topotune.tcep.stepping import DIVERGENCE, Flow, Stepper, row_norm

CROWD = 0.7
"""Share of live samples below which the finished ones are removed from the batch. Removal copies
everything; a finished sample that stays costs its share of every evaluation."""

LOOK_EVERY = 4
"""Steps between two looks for finished samples, on devices where a look drains the queue."""


class Rows(NamedTuple):
    """What is known of each sample.

    Attributes:
        state: (B, S).
        norm: (B,), the Euclidean norm of what has to vanish.
        nfe: (B,), evaluations that it took.
        bound: (B,) or no dimensions, the norm at which it has converged.
    """

    state: Tensor
    norm: Tensor
    nfe: Tensor
    bound: Tensor


class Samples:
    """The batch of a relaxation. Finished samples are frozen, and taken out when they are many.

    Args:
        flow: of all samples.
        start: (B, S).
        tolerance: on the root mean square of the flow; a number or (B,).

    Raises:
        ValueError: shapes or types do not fit.
    """

    def __init__(self, flow: Flow, start: Tensor, tolerance: float | Tensor) -> None:
        if start.ndim != 2 or not start.is_floating_point():
            raise ValueError(
                f"a start must be (B, S) of floating point (got {tuple(start.shape)}, "
                f"{start.dtype})"
            )
        scale = math.sqrt(start.shape[1])
        bound = torch.as_tensor(tolerance, dtype=start.dtype, device=start.device) * scale
        if bound.ndim and bound.shape != start.shape[:1]:
            raise ValueError(
                f"the tolerance must be one number or one a sample ({len(start)}), "
                f"not of shape {tuple(bound.shape)}"
            )
        self._all_flow, self.flow = flow, flow
        self._ceiling = DIVERGENCE * scale
        norm = start.new_full(start.shape[:1], torch.inf)
        self.rows = Rows(start, norm, torch.zeros_like(norm, dtype=torch.float32), bound)
        self.live = torch.ones_like(norm, dtype=torch.bool)
        self._count = start.shape[0]  # not len(), which torch.export takes for a constant
        self._looks = not stepping.queues(start.device)
        self._index: Tensor | None = None  # of the rows in the whole batch; None: all
        self._whole: Rows | None = None

    @property
    def mask(self) -> Tensor | None:
        """The live samples, (B,) of bool; None where all are known to be live."""
        return None if self._looks and self._count == len(self.live) else self.live

    def evaluate(self, stepper: Stepper) -> tuple[Tensor, Tensor]:
        """:meth:`Stepper.force` at the present state, counted."""
        self.rows.nfe.add_(self.live)
        return stepper.force(self.flow, self.rows.state)

    def judge(
        self, norm: Tensor, drift: Tensor | None, settles: bool, excused: Tensor | None
    ) -> None:
        """Record the norms and freeze the samples that are finished.

        Args:
            norm: (B,), of the flow; NaN or beyond its ceiling, a sample has diverged.
            drift: (B,), what has to fall below the bound, mostly the same; None: not known now.
            settles: whether a sample may have converged by now.
            excused: (B,), whose norm says nothing about divergence.
        """
        known = self.rows
        bad = ~(norm <= self._ceiling)
        if excused is not None:
            bad &= ~excused
        done = bad
        if drift is None:
            seen = torch.where(bad, norm, known.norm)
        else:
            seen = norm if drift is norm else torch.where(bad, norm, drift)
            if settles:
                done = bad | (seen <= known.bound)
        self.rows = known._replace(norm=torch.where(self.live, seen, known.norm))
        self.live = self.live & ~done

    def look(self, step: int) -> bool:
        """Whether any sample still moves; where that would wait for the device, the last answer."""
        if torch.compiler.is_exporting():
            return True  # all steps are taken; finished samples stand still in them
        if self._looks or step % LOOK_EVERY == 0:
            self._count = int(self.live.sum())
        return self._count > 0

    @property
    def sparse(self) -> bool:
        """Whether so few are live that removing the others pays."""
        return self._count < CROWD * len(self.live)

    def compact(self) -> Tensor:
        """Go on with the live samples only; their rows, (B',), in the batch as it was."""
        kept = self.live.nonzero().squeeze(1)
        self._whole = self._gathered()
        self._index = kept if self._index is None else self._index[kept]
        state, norm, nfe, bound = self.rows
        bound = bound[kept] if bound.ndim else bound
        self.rows = Rows(state[kept], norm[kept], nfe[kept], bound)
        self.live = self.live[kept]
        self._count = len(kept)
        self.flow = self._all_flow.rows(self._index)
        return kept

    def advance(self, stepper: Stepper, force: Tensor, norm: Tensor) -> None:
        """One step."""
        state, further = stepper.step(self.flow, self.rows.state, force, norm, self.mask)
        self.rows = self.rows._replace(state=state)
        if further:
            self.rows.nfe.add_(self.live, alpha=further)

    def finish(self, stepper: Stepper) -> Rows:
        """All samples, after the solver's last correction."""
        state, norm = stepper.last(self.rows.state, self.rows.norm)
        self.rows = self.rows._replace(state=state, norm=norm)
        return self._gathered()

    def state(self) -> Tensor:
        """The states of all samples, (B, S), the finished ones' included."""
        if self._whole is None:
            return self.rows.state
        self._whole.state[self._index] = self.rows.state
        return self._whole.state

    def _gathered(self) -> Rows:
        if self._whole is None:
            state, norm, nfe, bound = self.rows
            return Rows(state.clone(), norm, nfe, bound)
        self.state()
        self._whole.norm[self._index] = self.rows.norm
        self._whole.nfe[self._index] = self.rows.nfe
        return self._whole


class Orbit:
    """The last period of states whose flow is periodic in time.

    Args:
        memory: a periodic past.
    """

    def __init__(self, memory: Memory) -> None:
        self.count, self._period = memory.count, memory.period
        self._begin: Tensor | None = None
        self._states: list[Tensor] = []
        self._index: Tensor | None = None
        self._whole: Tensor | None = None

    def limit(self, steps: int) -> int:
        """Whole periods within these steps, at least one, in steps."""
        return max(1, steps // self.count) * self.count

    def drift(self, step: int, state: Tensor) -> Tensor | None:
        """``|s(t) - s(t - T)| / T``, (B,), at the end of a period; None elsewhere."""
        if step % self.count:
            return None
        begin, self._begin = self._begin, state.detach()
        return None if begin is None else row_norm(self._begin - begin) / self._period

    def record(self, step: int, state: Tensor, mask: Tensor | None) -> None:
        """Keep the state at the present phase; frozen samples keep what they have."""
        phase = step % self.count
        if not self._states:
            self._states = [state] * self.count
        elif mask is None:
            self._states[phase] = state
        else:
            self._states[phase] = torch.where(mask.unsqueeze(1), state, self._states[phase])

    def keep(self, kept: Tensor) -> None:
        """Go on with some of the samples only."""
        self._whole = self._gathered()
        self._index = kept if self._index is None else self._index[kept]
        self._states = [state[kept] for state in self._states]
        if self._begin is not None:
            self._begin = self._begin[kept]

    def result(self, state: Tensor) -> Tensor:
        """(count, B, S); of samples that ended within the first period, the rest is their first
        state. ``state`` is for a batch that never took a step."""
        if not self._states:
            self._states = [state] * self.count
        return self._gathered()

    def _gathered(self) -> Tensor:
        states = torch.stack(self._states)
        if self._whole is None:
            return states
        self._whole[:, self._index] = states
        return self._whole
