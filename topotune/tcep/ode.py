"""Relaxation by torchdiffeq's adaptive Dormand-Prince method (dopri5)."""

from __future__ import annotations

import torch
from torch import Tensor

from topotune.tcep.stepping import DIVERGENCE, Flow, Stepper, row_norm

UNITS = 4
"""Time steps of the other solvers that one chunk of time covers; residuals are looked at between
chunks."""

ACCURACY = 0.1
"""Error a step, relative and absolute, as a share of the tolerance on the flow."""

SMALLEST = 1e-3
"""Smallest step in units of the other solvers' step. Where a flow explodes no step is small enough,
and torchdiffeq would divide forever."""


class Dopri5(Stepper):
    """Chunks of time, each integrated with an error control that sees the worst sample.

    Args:
        dt: step of the other solvers; time is counted in it.
        steps: of them, the time there is.
        tolerance: on the root mean square of the flow, the smallest of all samples.
    """

    units = UNITS

    def __init__(self, dt: float, steps: int, tolerance: float) -> None:
        self.time_step = UNITS * dt
        self._dt, self._left = dt, steps
        self._accuracy = ACCURACY * tolerance
        self._longest: float | None = None

    def step(
        self, flow: Flow, state: Tensor, force: Tensor, norm: Tensor, live: Tensor | None
    ) -> tuple[Tensor, int]:
        """One chunk of time, the last one as long as is left."""
        from torchdiffeq import odeint

        span = self._dt * min(UNITS, self._left)
        self._left -= UNITS
        clock = _Clock(flow, state, force, live)
        times = torch.tensor([0.0, span], dtype=torch.float64, device=state.device)
        options = {"norm": _worst, "min_step": SMALLEST * self._dt, "step_t": times[1:]}
        if self._longest is not None:  # of the chunk before
            options["first_step"] = min(self._longest, span)
        error = {"rtol": self._accuracy, "atol": self._accuracy}
        new: Tensor = odeint(clock, state, times, method="dopri5", options=options, **error)[-1]
        self._longest = clock.longest
        if live is not None:
            new = torch.where(live.unsqueeze(1), new, state)
        return new, clock.evaluations


class _Clock:
    """The flow as torchdiffeq calls it: counts, remembers steps, and stands still where it must.

    Samples that are not live, and those whose flow exploded, do not move, so that they neither
    shrink the others' steps nor become infinite.
    """

    def __init__(self, flow: Flow, state: Tensor, force: Tensor, live: Tensor | None) -> None:
        self._flow, self._live = flow, live
        self._known = (state, self._still(force))
        self.evaluations = 0
        self.longest: float | None = None

    def __call__(self, time: Tensor, state: Tensor) -> Tensor:
        if state is self._known[0]:  # the start, which has been evaluated to look at its residual
            return self._known[1]
        self.evaluations += 1
        return self._still(self._flow(state))

    def _still(self, force: Tensor) -> Tensor:
        moves = row_norm(force) <= DIVERGENCE * force.shape[1] ** 0.5
        if self._live is not None:
            moves &= self._live
        return torch.where(moves.unsqueeze(1), force, 0.0)

    def callback_accept_step(self, time: Tensor, state: Tensor, dt: Tensor) -> None:
        """Called by torchdiffeq."""
        self.longest = max(self.longest or 0.0, float(dt))


def _worst(errors: Tensor) -> Tensor:
    """Root mean square of the worst sample: in a mean over the batch, few bad ones would hide."""
    return errors.square().mean(dim=1).amax().sqrt()
