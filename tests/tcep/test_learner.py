"""The learner: memory, a nudge that drowns, what fits what, the head alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tcep_cases import batch, small_network, turn
from tests.tcep_steps import inner, learnt, step
from topotune.errors import ConfigError
from topotune.tcep import probe
from topotune.tcep.baselines import bptt
from topotune.tcep.learner import EquilibriumLearner
from topotune.tcep.options import GRADIENTS, RECIRCULATIONS, TIMED, Learning

# ---- memory ----


def saved_bytes(gradient: str, steps: int) -> int:
    """All that one batch saves for backward passes."""
    network = small_network(torch.float32, gamma=0.2, name="euler", steps=steps, fixed=True)
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    learner = EquilibriumLearner(Learning(gradient=gradient))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, columns = step(network, learner)
    assert columns["nfe_free"][0] >= steps  # they have really been taken
    return total


def test_memory_of_equilibrium_propagation_does_not_grow_with_the_steps() -> None:
    few, many = saved_bytes("eqprop", 10), saved_bytes("eqprop", 1000)
    assert few > 1000
    assert abs(many - few) <= 0.02 * few


def test_memory_of_backpropagation_through_time_grows() -> None:
    few, some, many = (saved_bytes("bptt", steps) for steps in (10, 20, 40))
    assert (many - some) / (some - few) == pytest.approx(2, rel=0.02)
    assert many > 3.5 * few
    assert few > saved_bytes("eqprop", 10)


# ---- a nudge that drowns ----


def test_a_beta_that_rounding_swallows_is_named() -> None:
    network = small_network(torch.float32, gamma=0.2, tolerance=1e-3, steps=60)
    learner = EquilibriumLearner(Learning(beta=1e-6))
    _, columns = step(network, learner)
    fault = learner.fault(columns)
    assert fault is not None
    assert fault[0] == 0
    for text in ("nudged phase does not move", "beta 1e-06", "Raise beta, or use float64"):
        assert text in fault[1]
    double = network.double()
    learner = EquilibriumLearner(Learning(beta=1e-6))
    assert learner.fault(step(double, learner)[1]) is None


def test_a_loose_tolerance_does_not_silence_the_nudge() -> None:
    """Without a tolerance of its own the nudged phase would end where it starts."""
    network = small_network(torch.float64, gamma=0.2, tolerance=1e-9)
    step(network, EquilibriumLearner(Learning(beta=0.01)))
    expected = inner(network)
    loose = dataclasses.replace(network.dynamics.solver, tolerance=1e-2)
    network.dynamics = dataclasses.replace(network.dynamics, solver=loose)
    learner = EquilibriumLearner(Learning(beta=0.01))
    _, columns = step(network, learner)
    assert learner.fault(columns) is None
    cosine = torch.cosine_similarity(inner(network), expected, dim=0)
    assert float(cosine) > 0.999


def test_a_network_that_has_learnt_is_no_fault() -> None:
    learner = EquilibriumLearner(Learning(beta=0.01))
    fresh = small_network(torch.float32, gamma=0.2)
    rows = [step(network, learner, size=4)[1] for network in (fresh, learnt())]
    together = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    assert together["nudge_resolution"][1] < 1 < together["nudge_resolution"][0]
    assert learner.fault(together) is None
    weak = {**together, "nudge_force": together["nudge_force"][::-1]}
    fault = learner.fault(weak)  # the same, but with still much to learn
    assert fault is not None
    assert fault[0] == 1


def test_the_first_pull_is_remembered_across_a_resume() -> None:
    network = small_network(torch.float32, gamma=0.2)
    learner, later = (EquilibriumLearner(Learning(beta=1e-6)) for _ in range(2))
    columns = step(network, learner)[1]
    strong = {**columns, "nudge_force": 10 * columns["nudge_force"]}
    assert learner.fault({**strong, "nudge_resolution": np.array([5.0])}) is None
    assert learner.fault(columns) is None  # a tenth of the first pull
    later.load_state_dict(learner.state_dict())
    assert later.fault(columns) is None
    assert EquilibriumLearner(Learning(beta=1e-6)).fault(columns) is not None


# ---- what fits what ----


def refuses(gradient: str, kind: str) -> bool:
    return (kind == "gain" and gradient in ("implicit", "adjoint")) or (
        kind in TIMED and gradient == "adjoint"
    )


@pytest.mark.parametrize("field", ["energy", "transformer"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", RECIRCULATIONS)
def test_one_batch_of_every_combination(kind: str, gradient: str, field: str) -> None:
    gamma = None if kind == "none" else 0.2
    network = small_network(
        torch.float32,
        field=field,
        recirculation=kind,
        gamma=gamma,
        **turn(kind, 2),
        damping=1.5,
        steps=10 if gradient == "adjoint" else 100,  # it fails on a long way back
        tolerance=1e-3,
    )
    learner = EquilibriumLearner(Learning(gradient=gradient))
    if refuses(gradient, kind):
        with pytest.raises(ConfigError, match=f"'{gradient}' is not defined with .* '{kind}'"):
            learner.check(network)
        return
    learner.check(network)
    loss, columns = step(network, learner, size=4)
    learner.after_step(network)
    assert np.isfinite(loss)
    assert all(np.isfinite(values).all() for values in columns.values())
    assert learner.fault(columns) is None
    found = probe.flat_gradient(network)
    assert bool(torch.isfinite(found).all())
    assert float(found.norm()) > 0.01


# ---- the rest ----


@pytest.mark.parametrize("nudge", ["symmetric", "one_sided"])
def test_a_field_without_an_energy_on_an_orbit(nudge: str) -> None:
    """The rule is a mean over the period, not its sum."""
    network = small_network(
        field="transformer", recirculation="gain", gamma=0.2, kappa=0.5, time=2.0, damping=3.0
    )
    inputs, targets = batch(6)
    EquilibriumLearner(Learning(beta=0.05, nudge=nudge)).gradients(network, inputs, targets)
    used = inner(network).clone()
    network.zero_grad()
    bptt(network, inputs, targets)
    exact = inner(network)
    limit = 1e-3 if nudge == "symmetric" else 0.02
    assert float((used - exact).norm() / exact.norm()) < limit


def test_there_is_no_cosine_on_an_orbit() -> None:
    learner = EquilibriumLearner(Learning(probe_cosine=True))
    inputs, targets = batch(4)
    kinds = {}
    for kind in ("ring", "gain"):
        network = small_network(recirculation=kind, gamma=0.2, **turn(kind, 2))
        kinds[kind] = "gradient_cosine" in learner.epoch_metrics(network, inputs, targets)
    assert kinds == {"ring": True, "gain": False}


def test_the_probe_changes_neither_weights_nor_gradients_nor_random_numbers() -> None:
    network = small_network(torch.float32, gamma=0.2, tolerance=1e-5)
    learner = EquilibriumLearner(Learning(probe_cosine=True))
    step(network, learner)
    before = [p.detach().clone() for p in network.parameters()] + [probe.flat_gradient(network)]
    random = torch.get_rng_state()
    learner.epoch_metrics(network, *batch(4, torch.float32))
    learner.relaxation(network, batch(4, torch.float32)[0])
    assert torch.equal(torch.get_rng_state(), random)
    after = [*network.parameters(), probe.flat_gradient(network)]
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))


def test_the_head_learns_on_equilibria_that_stay_as_they_were() -> None:
    network = small_network(torch.float32, gamma=0.2, tolerance=1e-5, steps=60)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    learner = EquilibriumLearner(Learning(gradient="head"))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    losses = []
    for _ in range(12):
        losses.append(step(network, learner)[0])
        optimizer.step()
        learner.after_step(network)
    assert losses[-1] < 0.8 * losses[0]
    moved = {n for n, v in network.state_dict().items() if not torch.equal(v, before[n])}
    assert moved == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"beta": "learned", "nudge": "one_sided"}, "beta"),
        ({"beta": "learned", "gradient": "bptt"}, "beta"),
        ({"noise": "gaussian", "noise_level": 0.1, "gradient": "implicit"}, "noise"),
        ({"noise": "poisson", "noise_level": 0.1, "gradient": "adjoint"}, "noise"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EquilibriumLearner(Learning(**options))
    assert caught.value.place == place


@pytest.mark.parametrize("change", [{"field": "transformer"}, {"recirculation": "shift"}])
def test_a_learned_beta_needs_an_energy(change: dict[str, Any]) -> None:
    learner = EquilibriumLearner(Learning(beta="learned"))
    learner.check(small_network(gamma=0.2))
    with pytest.raises(ConfigError, match=r"^beta: 'learned' needs an energy"):
        learner.check(small_network(gamma=0.2, **change))


def test_another_learners_state_is_refused() -> None:
    with pytest.raises(KeyError):
        EquilibriumLearner(Learning()).load_state_dict({"beta": 0.1})
