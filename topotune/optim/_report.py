"""Numbers about the fields, computed when somebody asks: all of these wait for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from topotune.optim._fields import COMMON, CONTROLLED, CURRENT, ENERGY, SKIPPED, FieldBatch
from topotune.optim._state import coupling_of


def kind_of(state: Mapping[str, Any]) -> type[FieldBatch]:
    """The coupling that the state of a tensor with fields belongs to."""
    found = coupling_of(state)
    assert found is not None
    return found


def common_scalars(states: Sequence[dict[str, Tensor]]) -> Tensor:
    """The (4, k) common scalars on the CPU."""
    return torch.stack([state["scalars"][:COMMON].cpu() for state in states], dim=1)


def total_energy(states: Sequence[dict[str, Tensor]]) -> float:
    """Sum of the raw energies of the last step."""
    return common_scalars(states)[ENERGY].sum().item() if states else 0.0


def field_metrics(states: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """See ``TopologicalAdam.field_metrics``."""
    names = ("energy", "j_t", "alpha_norm", "beta_norm", "alpha_beta_corr")
    rows = []
    for state in states:
        alpha, beta = (field.double() for field in kind_of(state).materialise(state))
        centred_a, centred_b = alpha - alpha.mean(), beta - beta.mean()
        norms = centred_a.norm() * centred_b.norm()
        correlation = (centred_a * centred_b).sum() / norms if norms > 0.0 else 0.0
        energy = 0.5 * (alpha.square() + beta.square()).mean()
        current = state["scalars"][CURRENT]
        rows.append([float(x) for x in (energy, current, alpha.norm(), beta.norm(), correlation)])
    if not rows:
        return dict.fromkeys(names, 0.0)
    return {
        name: sum(column) / len(rows)
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def metrics(
    states: Sequence[dict[str, Tensor]],
    directions: Sequence[tuple[dict[str, Tensor], Mapping[str, Any]]],
) -> dict[str, float]:
    """See ``TopologicalAdam.metrics``.

    Args:
        states: of the tensors with fields.
        directions: the same states with their parameter groups, for ``topo_ratio``.
    """
    found = dict.fromkeys(
        (
            "energy",
            "energy_controlled",
            "coupling_current",
            "alpha_norm",
            "beta_norm",
            "alpha_beta_cos",
            "topo_ratio",
            "skipped_nonfinite",
        ),
        0.0,
    )
    if not states:
        return found
    common = common_scalars(states)
    means = common.mean(1).tolist()
    found["energy"], found["energy_controlled"] = means[ENERGY], means[CONTROLLED]
    found["coupling_current"] = means[CURRENT]
    found["skipped_nonfinite"] = common[SKIPPED].sum().item()
    sums = torch.zeros(5, dtype=torch.float64)
    for state, group in directions:
        alpha, beta = (field.double() for field in kind_of(state).materialise(state))
        correction = torch.tanh(alpha - beta).mul_(group["w_topo"])
        parts = (
            alpha * alpha,
            beta * beta,
            alpha * beta,
            correction.square(),
            adam_direction(state, group).square(),
        )
        sums += torch.stack([part.sum() for part in parts]).cpu()
    alpha_square, beta_square, product, correction_square, direction_square = sums.tolist()
    found["alpha_norm"], found["beta_norm"] = alpha_square**0.5, beta_square**0.5
    if alpha_square * beta_square != 0.0:
        found["alpha_beta_cos"] = product / (alpha_square**0.5 * beta_square**0.5)
    if direction_square != 0.0:
        found["topo_ratio"] = (correction_square / direction_square) ** 0.5
    return found


def adam_direction(state: Mapping[str, Tensor], group: Mapping[str, Any]) -> Tensor:
    """Adam's direction of the last step, in float64, from the moments as they are."""
    beta1, beta2 = group["betas"]
    step = state["step"].item()
    mean = state["exp_avg"].double() / (1.0 - beta1**step)
    square = state["exp_avg_sq"].double() / (1.0 - beta2**step)
    # With eps inside the root, this average of squares holds it already.
    floor = 0.0 if group["eps_inside_sqrt"] else float(group["eps"])
    direction: Tensor = mean.div_(square.sqrt_().add_(floor))
    return direction
