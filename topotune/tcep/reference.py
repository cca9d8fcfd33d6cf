"""The slow, readable twin of TCEP: formulas as loops, and dense linear algebra where it is exact.

This is the oracle of the tests, for one small sample at a time. The fields' formulas are written
from the design and share no code with the fast ones; the rest takes any flow and any cost, given
as functions of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp

import torch
from torch import Tensor

from topotune.errors import RunError
from topotune.tcep.energy import EnergyField
from topotune.tcep.functions import LAYER_NORM_EPS, SOFTNESS
from topotune.tcep.transformer import TransformerField

RUNAWAY = 1e6
"""A flow that has grown so much will not come to rest."""


def normalised(row: Tensor) -> Tensor:
    """A token without its mean, over ``sqrt(variance + eps)``; (D,)."""
    centred = row - row.sum() / len(row)
    return centred / torch.sqrt((centred * centred).sum() / len(row) + LAYER_NORM_EPS)


def sigma(x: Tensor) -> Tensor:
    """The smooth ReLU, ``(x + sqrt(x^2 + e)) / 2``."""
    return (x + torch.sqrt(x**2 + SOFTNESS)) / 2


def phi(x: Tensor) -> Tensor:
    """The integral of :func:`sigma` from 0, by the textbook formula for that of the root."""
    root = torch.sqrt(x**2 + SOFTNESS)
    of_root = x * root / 2 + SOFTNESS / 2 * torch.log((x + root) / SOFTNESS**0.5)
    return x**2 / 4 + of_root / 2


def ring_kernel(tokens: int, period: int, kappa: float) -> Tensor:
    """``K`` of the ring, (N, N) float64: ``exp(-kappa d_T)`` over its largest row sum.

    Args:
        tokens: N.
        period: T; ``d_T`` is the distance of two tokens around a ring of T.
        kappa: decay a token.
    """
    rows = []
    for i in range(tokens):
        row = []
        for j in range(tokens):
            distance = abs(i - j) % period
            row.append(exp(-kappa * min(distance, period - distance)))
        rows.append(row)
    largest = max(sum(row) for row in rows)
    return torch.tensor([[entry / largest for entry in row] for row in rows], dtype=torch.float64)


def energy(
    field: EnergyField,
    h: Tensor,
    z: Tensor,
    u: Tensor,
    damping: float = 0.0,
    gamma: float = 0.0,
    kernel: Tensor | None = None,
) -> Tensor:
    """``E`` of one sample, section 1 of the design, term by term.

    Args:
        field: holds the weights, ``b`` (``sharpness``) and ``c`` (``scale``).
        h, z, u: tokens (N, D), hidden units (M,), drive (N, D).
        damping: lambda.
        gamma: strength of the ring.
        kernel: ``K`` of the ring, (N, N), symmetric; None: no ring.

    Returns:
        A 0-d tensor, differentiable in the state and in the weights.
    """
    tokens, heads, b = field.tokens, field.heads, field.sharpness
    g = [normalised(h[i]) for i in range(tokens)]
    inner = damping / 2 * (h * h).sum()
    for i in range(tokens):
        inner = inner - u[i] @ h[i]
        if kernel is not None:
            for j in range(tokens):
                inner = inner - gamma / 2 * kernel[i, j] * (h[i] @ h[j])
    for head in range(heads):
        for i in range(tokens):
            total = torch.zeros_like(h[0, 0])
            for j in range(tokens):
                if j != i:
                    q_i, k_j = g[i] @ field.query[head], g[j] @ field.key[head]
                    total = total + torch.exp(b * (q_i @ k_j))
            inner = inner - torch.log(total) / (b * heads)
    for i in range(tokens):
        inner = inner - phi(g[i] @ field.memory + field.memory_bias).sum()
    r = sigma(z)
    drawn = torch.cat(g) @ field.hidden_weight + field.hidden_bias
    return field.scale * inner + (z * r - phi(z)).sum() - r @ drawn


def transformer_flow(
    field: TransformerField,
    h: Tensor,
    u: Tensor,
    damping: float = 0.0,
    mixing: Tensor | None = None,
) -> Tensor:
    """``u - lambda h + Attn(LN h) + FFN(LN h) + tau`` of one sample, section 4 of the design.

    Args:
        field: holds the weights and ``b`` (``sharpness``).
        h, u: tokens and drive, (N, D).
        damping: lambda.
        mixing: (N, N), the recirculation's matrix over tokens, its strength included, such as
            ``gamma K``; None: no recirculation.

    Returns:
        (N, D).
    """
    tokens, b = field.tokens, field.sharpness
    g = [normalised(h[i]) for i in range(tokens)]
    rows = []
    for i in range(tokens):
        row = u[i] - damping * h[i]
        for head in range(field.heads):
            q_i = g[i] @ field.query[head]
            weights = [torch.exp(b * (q_i @ (g[j] @ field.key[head]))) for j in range(tokens)]
            for j in range(tokens):
                share = weights[j] / torch.stack(weights).sum()
                row = row + share * (g[j] @ field.value[head]) @ field.output[head]
        row = row + sigma(g[i] @ field.inner + field.inner_bias) @ field.outer + field.outer_bias
        if mixing is not None:
            for j in range(tokens):
                row = row + mixing[i, j] * h[j]
        rows.append(row)
    return torch.stack(rows)


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


def implicit_gradient(
    flow: Callable[[Tensor], Tensor],
    cost: Callable[[Tensor], Tensor],
    state: Tensor,
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """The exact gradient of a cost at the equilibrium, by the implicit function theorem.

    ``dC/dtheta - (dF/dtheta)^T J^-T dC/ds``, from the dense Jacobian ``J`` of the flow ``F``.

    Args:
        flow: as for :func:`jacobian`; reads the parameters.
        cost: from the state to a 0-d tensor; may read the parameters too.
        state: an equilibrium of the flow, one sample.
        parameters: those to differentiate with respect to; what they do not affect gets zeros.

    Returns:
        One gradient a parameter.
    """
    with torch.inference_mode(False), torch.enable_grad():
        point = state.detach().clone().requires_grad_()
        (pull,) = torch.autograd.grad(cost(point), point, materialize_grads=True)
        weights = torch.linalg.solve(jacobian(flow, state).T, pull.flatten())
        fixed = state.detach()
        total = cost(fixed) - weights @ flow(fixed).flatten()
        if not total.requires_grad:
            return [torch.zeros_like(p) for p in parameters]
        found = torch.autograd.grad(
            total, list(parameters), allow_unused=True, materialize_grads=True
        )
    return list(found)


def finite_difference_gradient(
    loss: Callable[[], Tensor | float],
    parameters: Sequence[Tensor],
    indices: Sequence[tuple[int, int]],
    eps: float = 1e-4,
) -> Tensor:
    """Some entries of a gradient by central differences.

    Args:
        loss: the loss at the equilibrium, solved anew by every call.
        parameters: what the loss depends on; written to, and restored bit for bit.
        indices: which entries: (number of the parameter, number of its flattened entry).
        eps: half of the difference; the error is of order ``eps^2``.

    Returns:
        One derivative an index, float64.
    """
    slopes = []
    for which, entry in indices:
        values = parameters[which].detach().view(-1)
        kept = values[entry].clone()
        losses = []
        for sign in (1, -1):
            values[entry] = kept + sign * eps
            losses.append(float(torch.as_tensor(loss()).detach()))
        values[entry] = kept
        slopes.append((losses[0] - losses[1]) / (2 * eps))
    return torch.tensor(slopes, dtype=torch.float64)


def _rate(flow: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    with torch.no_grad():
        return flow(state).detach()


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
