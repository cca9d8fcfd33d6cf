"""Small TCEP networks and batches for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topotune.tcep.learner import EquilibriumLearner
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import TIMED, Dynamics, Learning, Solver

SIDE = 6
CLASSES = 4


def some(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, drawn in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def dynamics(**changes: Any) -> Dynamics:
    """Dynamics of a test; solver settings among the changes go to the solver."""
    inner = {
        k: changes.pop(k) for k in ("name", "steps", "tolerance", "step", "fixed") if k in changes
    }
    settings = {"steps": 400, "tolerance": 1e-6, **inner}
    return Dynamics(**changes, solver=Solver(**settings))


def turn(kind: str, amount: float | None) -> dict[str, Any]:
    """T of a recirculation, by the name that :class:`Dynamics` has for its unit."""
    if amount is None:
        return {}
    return {"time" if kind in TIMED else "period": amount}


def small_network(
    dtype: torch.dtype = torch.float64, seed: int = 0, *, field: str = "energy", **changes: Any
) -> TCEPNetwork:
    """6 tokens of width 8, 12 hidden units, initialised from a seed."""
    torch.manual_seed(seed)
    network = TCEPNetwork(
        1,
        SIDE,
        CLASSES,
        width=8,
        heads=2,
        hidden=12,
        memory=10,
        field=field,
        dynamics=dynamics(**changes),
    )
    return network.to(dtype)


def batch(
    size: int = 12, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Images whose class can be learnt: each has a bright row of its own."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(size) % CLASSES
    images = torch.randn(size, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    images[torch.arange(size), 0, targets] += 1.5
    return images.to(dtype), targets


def train(network: TCEPNetwork, learning: Learning, steps: int, lr: float = 1e-2) -> list[float]:
    """Train on one batch by Adam; the losses."""
    learner = EquilibriumLearner(learning)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    inputs, targets = batch(24, network.position.dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(float(learner.gradients(network, inputs, targets).loss))
        optimizer.step()
        learner.after_step(network)
    return losses
