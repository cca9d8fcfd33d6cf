"""Exact answers about a small field: dense Jacobians, equilibria, and the flow with damping."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from topotune.errors import RunError
from topotune.tcep.fields import Field
from topotune.testing.check import check

RUNAWAY = 1e6
"""A flow that has grown so much will not come to rest."""

DIFFERENCE = 1e-3
"""Half of a finite difference; the formula's error is of its fourth power."""


def damped_flow(field: Field, state: Tensor, drive: Tensor, damping: float) -> Tensor:
    """The flow (B, S) with ``-lambda h`` on the tokens."""
    count = field.tokens * field.width
    rates = torch.zeros_like(state)
    rates[:, :count] = damping
    return field.flow(state, drive) - rates * state


def damped_energy(field: Field, state: Tensor, drive: Tensor, damping: float) -> Tensor:
    """The energy with that of the damping, (B,)."""
    tokens, _ = field.split(state)
    weight = field.metric(state)[0, 0].detach()
    return field.energy(state, drive) + weight * damping / 2 * tokens.square().sum(dim=(1, 2))


def rest(field: Field, drive: Tensor, damping: float) -> Tensor:
    """The equilibria (B, S) that the damped flow leads to from ``initial``, one by one.

    Raises:
        AssertionError: it does not come to rest.
    """
    found = []
    for i in range(len(drive)):
        one = drive[i : i + 1]

        def flow(state: Tensor, one: Tensor = one) -> Tensor:
            return damped_flow(field, state, one, damping)

        try:
            found.append(solve_equilibrium(flow, field.initial(one)))
        except RunError as error:
            check(False, f"the damped flow does not come to rest at lambda {damping:g}: {error}")
    return torch.cat(found)


def energy_slope(field: Field, state: Tensor, drive: Tensor, entry: int) -> Tensor:
    """The derivative of one sample's energy along one entry of its state, of fourth order."""

    def at(shift: float) -> Tensor:
        moved = state.clone()
        moved[0, entry] += shift
        return field.energy(moved, drive)[0]

    near = at(DIFFERENCE) - at(-DIFFERENCE)
    far = at(2 * DIFFERENCE) - at(-2 * DIFFERENCE)
    return (8 * near - far) / (12 * DIFFERENCE)


def jacobian(flow: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    """The dense Jacobian of a flow at one state, by one backward pass a row.

    Args:
        flow: from a state to its rate of change, of the same shape and differentiable. A batch of
            one sample, (1, S), is as good as (S,).
        state: where.

    Returns:
        (S, S), ``J[i, j] = d flow_i / d state_j`` of the flattened tensors.

    Raises:
        ValueError: autograd sees no way from the state to the flow.
    """
    with torch.inference_mode(False), torch.enable_grad():
        point = state.detach().clone().requires_grad_()
        values = flow(point).flatten()
        if not values.requires_grad:
            raise ValueError("the flow is not differentiable: autograd cannot follow it")
        rows = [
            torch.autograd.grad(value, point, retain_graph=True, materialize_grads=True)[0]
            for value in values
        ]
    return torch.stack([row.flatten() for row in rows])


def solve_equilibrium(
    flow: Callable[[Tensor], Tensor],
    start: Tensor,
    tolerance: float = 1e-12,
    steps: int = 500,
) -> Tensor:
    """The equilibrium that a flow leads to from a start, by Newton's method on the dense Jacobian.

    Every step is one of implicit Euler, ``(shift - J) ds = F``, which follows the flow and so ends
    in an attractor; the shift falls with the residual, and without it the step is Newton's.

    Args:
        flow: as for :func:`jacobian`; one sample.
        start: float64.
        tolerance: on the root mean square of the flow, over the larger of 1 and that of the state.
        steps: steps at most.

    Returns:
        The equilibrium, shaped as the start, detached.

    Raises:
        ValueError: the start is not float64.
        RunError: the steps are used up, or the flow runs away.
    """
    if start.dtype != torch.float64:
        raise ValueError(f"an equilibrium to machine precision needs float64 (got {start.dtype})")
    state, caution = start.detach().clone(), 1.0
    residual = _rms(_rate(flow, state))
    highest = RUNAWAY * max(1.0, residual)
    for _ in range(steps):
        matrix, rate = jacobian(flow, state), _rate(flow, state)
        settled = residual <= tolerance * max(1.0, _rms(state))
        # Twice the fastest growth: a step may not jump back onto a repeller that the flow leaves.
        growth = float(torch.linalg.eigvals(matrix).real.max())
        # One Newton step more when it has settled takes the last digits along.
        shift = 0.0 if settled else max(caution * residual, 2 * growth)
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        move, failed = torch.linalg.solve_ex(shift * identity - matrix, rate.flatten())
        there = state + move.view_as(state)
        after = _rms(_rate(flow, there))
        if settled:
            return there if not failed and after <= residual else state
        # Written so that not-a-number fails the comparison.
        if not failed and after <= 2 * residual:
            state, residual, caution = there, after, caution / 2
        else:
            caution *= 8
        if residual > highest:
            break
    raise RunError(
        f"no equilibrium within {steps} Newton steps: the flow's root mean square is "
        f"{residual:.3g}, above {tolerance:.3g}"
    )


def _rate(flow: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    with torch.no_grad():
        return flow(state).detach()


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
