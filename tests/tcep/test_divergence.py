"""What a learner and its probe say of networks that left the finite numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.tcep_cases import batch, small_network
from tests.tcep_steps import Columns, step
from topotune.tcep import probe
from topotune.tcep.learner import EquilibriumLearner
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import GRADIENTS, Learning


def spoilt(value: float, field: str = "energy", **changes: Any) -> TCEPNetwork:
    network = small_network(torch.float32, field=field, steps=30, gamma=0.2, **changes)
    with torch.no_grad():
        for parameter in network.field.parameters():
            parameter.mul_(value)
    return network


@pytest.mark.parametrize("field", ["energy", "transformer"])
@pytest.mark.parametrize("value", [1e12, float("nan")])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_divergence_is_the_relaxations_fault(gradient: str, value: float, field: str) -> None:
    learner = EquilibriumLearner(Learning(gradient=gradient))
    _, columns = step(spoilt(value, field), learner)
    assert columns["diverged_share"][0] == 1
    assert columns["unconverged_share"][0] == 1
    fault = learner.fault(columns)
    assert fault is not None
    assert fault[0] == 0
    assert "the relaxation of 100% of the samples left the finite numbers" in fault[1]


def test_the_first_of_several_faults_is_told() -> None:
    learner = EquilibriumLearner(Learning())
    columns: Columns = {
        "diverged_share": np.array([0.0, 0.0, np.nan, 0.25]),
        "nudge_resolution": np.array([5.0, 5.0, 5.0, 0.5]),
        "nudge_force": np.ones(4),
    }
    assert learner.fault(columns) is not None
    assert (learner.fault(columns) or (9, ""))[0] == 2
    columns["nudge_resolution"][1] = 0.5
    fault = learner.fault(columns)
    assert fault is not None
    assert fault[0] == 1
    assert "does not move" in fault[1]


def test_an_adjoint_that_cannot_be_retraced_says_so() -> None:
    """Backwards in time a contracting flow explodes: long before it, the adjoint is given up."""
    network = small_network(torch.float32, gamma=0.2, steps=150, tolerance=1e-3, damping=2.0)
    learner = EquilibriumLearner(Learning(gradient="adjoint"))
    _, columns = step(network, learner, size=4)
    assert columns["adjoint_failed"][0] == 1
    assert columns["diverged_share"][0] == 0
    assert bool(probe.flat_gradient(network).isnan().all())
    fault = learner.fault(columns)
    assert fault is not None
    assert "the adjoint equation could not be integrated" in fault[1]


@pytest.mark.parametrize("value", [1e20, float("nan")])
@pytest.mark.parametrize("kind", ["ring", "delay", "gain"])
def test_the_probe_of_a_network_that_diverges_says_nan_and_does_not_raise(
    kind: str, value: float
) -> None:
    network = spoilt(value, recirculation=kind)
    inputs, targets = batch(4, torch.float32)
    learner = EquilibriumLearner(Learning())
    found = learner.epoch_metrics(network, inputs, targets)
    assert found["gamma"] == 0.2
    assert found.keys() >= {"one_sided_lipschitz", "stability_margin", "recirculation_gain"}
    if value != value:
        assert np.isnan(found["stability_margin"])
    curves = learner.relaxation(network, inputs)
    assert not np.isfinite(curves["residual"]).all()
