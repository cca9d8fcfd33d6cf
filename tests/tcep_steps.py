"""One batch through a learner, for tests."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tests.tcep_cases import batch, small_network
from topotune.tcep.learner import EquilibriumLearner
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import Learning

Columns = dict[str, np.ndarray]


def step(
    network: TCEPNetwork, learner: EquilibriumLearner, size: int = 12
) -> tuple[float, Columns]:
    """The loss, and what one batch measured, as columns of one row."""
    network.zero_grad()
    inputs, targets = batch(size, network.position.dtype)
    found = learner.gradients(network, inputs, targets)
    assert not found.loss.requires_grad
    assert not found.outputs.requires_grad
    assert not any(value.requires_grad for value in found.measured.values())
    assert all(value.ndim == 0 for value in found.measured.values())
    return float(found.loss), {k: np.array([float(v)]) for k, v in found.measured.items()}


def inner(network: TCEPNetwork) -> Tensor:
    """The gradients of all but the readout, in one row."""
    rows = [p.grad for name, p in network.named_parameters() if not name.startswith("head.")]
    return torch.cat([row.flatten() for row in rows if row is not None])


@cache
def _learnt() -> TCEPNetwork:
    network = small_network(torch.float32, gamma=0.2, tolerance=1e-5, steps=60)
    learner = EquilibriumLearner(Learning())
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for _ in range(7):
        loss, _ = step(network, learner, size=4)
        optimizer.step()
    assert loss < 3e-3
    return network


def learnt() -> TCEPNetwork:
    """A network in float32 with little left to learn of a batch of 4."""
    return copy.deepcopy(_learnt())
