"""The adjoint method: a free phase integrated forwards, and its adjoint backwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def integrate_adjoint(
    flow: nn.Module,
    start: Tensor,
    *,
    duration: float,
    tolerance: float,
    parameters: Sequence[Tensor],
) -> Tensor:
    """The state after a time, whose backward pass integrates the adjoint equation.

    Args:
        flow: a module of (time, state).
        start: (B, S).
        duration: time to integrate over.
        tolerance: a third of it is the solver's absolute and relative error a step, both ways.
        parameters: tensors that the flow depends on and that want gradients.
    """
    from torchdiffeq import odeint_adjoint

    times = torch.tensor([0.0, duration], dtype=start.dtype, device=start.device)
    error = tolerance / 3
    path: Tensor = odeint_adjoint(
        flow,
        start,
        times,
        method="dopri5",
        rtol=error,
        atol=error,
        adjoint_params=tuple(p for p in parameters if p.requires_grad),
    )
    return path[-1]
