"""The adjoint method: a free phase integrated forwards, and its adjoint backwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_REFUSALS = ("max_num_steps exceeded", "underflow in dt", "non-finite values in state")


def is_refusal(error: AssertionError) -> bool:
    """Whether torchdiffeq says that it cannot integrate this flow (and is not just broken)."""
    return str(error).startswith(_REFUSALS)


def integrate_adjoint(
    flow: nn.Module,
    start: Tensor,
    *,
    duration: float,
    tolerance: float,
    most_steps: int,
    parameters: Sequence[Tensor],
) -> Tensor:
    """The state after a time, whose backward pass integrates the adjoint equation.

    Args:
        flow: a module of (time, state).
        start: (B, S).
        duration: time to integrate over.
        tolerance: a third of it is the solver's absolute and relative error a step, both ways.
        most_steps: adaptive steps at most, each way. Where a flow explodes no step is small
            enough, and the error control would divide forever.
        parameters: tensors that the flow depends on and that want gradients.

    Raises:
        AssertionError: the integration fails, here or in the backward pass; of those,
            :func:`is_refusal` tells the ones that are the flow's fault.
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
        options={"max_num_steps": most_steps},
        adjoint_params=tuple(p for p in parameters if p.requires_grad),
    )
    return path[-1]
