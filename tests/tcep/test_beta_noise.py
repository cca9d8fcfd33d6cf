"""Learned beta settles, resumes and does not sink; state noise is seeded and cancels."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tcep_cases import batch, small_network
from tests.tcep_steps import inner, learnt, step
from topotune.tcep import learner as learner_module
from topotune.tcep import nudging, probe
from topotune.tcep.learner import BETA_RANGE, EquilibriumLearner
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import Learning

# ---- learned beta ----


def disagreement(network: TCEPNetwork, beta: float) -> float:
    """Of the one-sided and the symmetric gradient, the readout's apart."""
    inputs, targets = batch()
    rows = []
    for nudge in ("one_sided", "symmetric"):
        learning = Learning(beta=beta, nudge=nudge)
        network.zero_grad()
        EquilibriumLearner(learning).gradients(network, inputs, targets)
        rows.append(inner(network).clone())
    return float((rows[0] - rows[1]).norm() / rows[1].norm())


@pytest.mark.parametrize("start", [0.01, 1.0])
@pytest.mark.parametrize("bound", [0.01, 0.05])
def test_a_learned_beta_settles_where_the_disagreement_meets_its_bound(
    bound: float, start: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_module, "ADAPT_EVERY", 1)
    network = small_network(gamma=0.2, tolerance=1e-9)
    learner = EquilibriumLearner(Learning(beta="learned", beta_start=start, beta_bound=bound))
    seen = []
    for _ in range(14):
        seen.append(float(step(network, learner)[1]["beta"][0]))
    assert seen[0] == start
    assert len(set(seen)) > 3
    assert BETA_RANGE[0] < learner.beta < BETA_RANGE[1]
    assert disagreement(network, learner.beta) == pytest.approx(bound, rel=0.1)


def test_a_learned_beta_does_not_sink_into_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding makes differ grows as beta falls: following it down would never end."""
    monkeypatch.setattr(learner_module, "ADAPT_EVERY", 1)
    network = learnt()
    learner = EquilibriumLearner(Learning(beta="learned", beta_bound=0.02))
    for _ in range(8):
        step(network, learner, size=4)
    assert learner.beta > 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learned_beta_goes_on_after_a_resume(dtype: torch.dtype) -> None:
    network = small_network(dtype, gamma=0.2)
    first, second = (EquilibriumLearner(Learning(beta="learned")) for _ in range(2))
    for _ in range(8):
        step(network, first)
    state = torch.utils._pytree.tree_map(copy.copy, first.state_dict())
    second.load_state_dict(state)
    assert second.beta == first.beta != 0.1
    for _ in range(8):
        (_, one), (_, other) = step(network, first), step(network, second)
        assert one == other
    assert second.state_dict() == first.state_dict()


def test_a_learned_beta_survives_a_batch_without_a_gradient() -> None:
    network = small_network(torch.float32, gamma=0.2)
    nn.init.zeros_(network.head.weight)  # no pull at all
    learner = EquilibriumLearner(Learning(beta="learned"))
    step(network, learner)
    assert 0.1 <= learner.beta <= BETA_RANGE[1]
    nn.init.normal_(network.head.weight)
    assert np.isfinite(step(network, learner)[0])


# ---- noise ----


def noisy(kind: str, level: float, seed: int, **changes: Any) -> Tensor:
    network = small_network(gamma=0.2, steps=12)
    torch.manual_seed(seed)
    step(network, EquilibriumLearner(Learning(noise=kind, noise_level=level, **changes)))
    return probe.flat_gradient(network)


@pytest.mark.parametrize("gradient", ["eqprop", "bptt", "head"])
@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_noise_is_seeded_and_of_level_zero_none(kind: str, gradient: str) -> None:
    changes: dict[str, Any] = {"gradient": gradient}
    one = noisy(kind, 0.05, 3, **changes)
    assert torch.equal(noisy(kind, 0.05, 3, **changes), one)
    assert not torch.allclose(noisy(kind, 0.05, 4, **changes), one, rtol=1e-3)
    assert torch.equal(noisy(kind, 0.0, 3, **changes), noisy("none", 0.0, 4, **changes))


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_common_noise_cancels_from_the_contrast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def spread() -> float:
        rows = torch.stack([noisy(kind, 0.02, seed, beta=0.05) for seed in range(4)])
        return float(rows.var(dim=0).sum())

    common = spread()
    monkeypatch.setattr(nudging, "replace", lambda noise, copies: noise)  # each phase its own
    assert 0 < common < 0.02 * spread()
