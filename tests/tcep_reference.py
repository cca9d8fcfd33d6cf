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

from topotune.tcep.energy import EnergyField
from topotune.tcep.functions import LAYER_NORM_EPS, SOFTNESS
from topotune.tcep.transformer import TransformerField
from topotune.testing.rest import jacobian, solve_equilibrium

__all__ = ["jacobian", "solve_equilibrium"]  # of the same oracle, for any field


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
