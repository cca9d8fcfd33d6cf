"""The gradients of equilibrium propagation against exact ones, in float64 and float32."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.tcep_cases import batch, small_network, train, turn
from tests.tcep_reference import (
    finite_difference_gradient,
    implicit_gradient,
    solve_equilibrium,
)
from topotune.tcep import probe
from topotune.tcep.baselines import bptt
from topotune.tcep.gradients import free_phase, implicit
from topotune.tcep.learner import EquilibriumLearner
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import Learning


@cache
def _network(field: str, trained: bool, recirculation: str = "ring") -> TCEPNetwork:
    network = small_network(field=field, recirculation=recirculation)
    if trained:
        losses = train(network, Learning(beta=0.1), 20 if field == "energy" else 10)
        assert 0.05 < losses[-1] < 0.3 * losses[0]  # trained, and with something left to learn
    return network


def cosine(network: TCEPNetwork, dtype: torch.dtype = torch.float64, **learning: object) -> float:
    network = copy.deepcopy(network).to(dtype)
    inputs, targets = batch(dtype=dtype)
    options = Learning(**learning)  # type: ignore[arg-type]
    beta = torch.tensor(float(options.beta), dtype=dtype)
    return probe.gradient_cosine(network, inputs, targets, options, beta)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("nudge", "beta", "least"),
    [
        ("symmetric", 0.01, 0.99999),
        ("symmetric", 0.05, 0.99999),
        ("symmetric", 0.1, 0.99999),
        ("symmetric", 0.22, 0.999),
        ("one_sided", 0.22, 0.99),
    ],
)
def test_float64_cosine(nudge: str, beta: float, least: float, trained: bool) -> None:
    assert cosine(_network("energy", trained), nudge=nudge, beta=beta) > least


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("beta", [0.01, 0.05, 0.1, 0.22])
def test_float32_cosine(beta: float, trained: bool) -> None:
    assert cosine(_network("energy", trained), torch.float32, beta=beta) > 0.999


@pytest.mark.parametrize("trained", [False, True])
def test_error_of_the_symmetric_nudge_falls_with_beta_squared(trained: bool) -> None:
    network = _network("energy", trained)
    inputs, targets = batch()
    exact = probe.exact_gradient(network, inputs, targets)

    def error(beta: float, nudge: str) -> float:
        tight = copy.deepcopy(network)
        tight.dynamics = probe.exact_copy(network).dynamics
        learning = Learning(beta=beta, nudge=nudge)
        used = probe.eqprop_gradient(tight, inputs, targets, learning, torch.tensor(beta))
        return float((used - exact).norm() / exact.norm())

    # The nudged tolerance is a share of beta, so its own error is linear in nothing and small.
    assert error(0.4, "symmetric") / error(0.1, "symmetric") > 9
    assert 2.5 < error(0.4, "one_sided") / error(0.1, "one_sided") < 6


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("nudge", ["symmetric", "one_sided"])
def test_the_correction_makes_the_transformer_field_exact(nudge: str, trained: bool) -> None:
    network = _network("transformer", trained)
    corrected = cosine(network, beta=0.22, nudge=nudge)
    plain = cosine(network, beta=0.22, nudge=nudge, correction=False)
    assert corrected > (0.9999 if nudge == "symmetric" else 0.99)
    assert plain < 0.9999
    assert plain < corrected


def test_the_correction_makes_the_shift_exact() -> None:
    network = small_network(recirculation="shift", gamma=0.4, period=1)
    assert cosine(network, beta=0.1) > 0.99999
    assert cosine(network, beta=0.1, correction=False) < 0.9999


@pytest.mark.parametrize("kind", ["ring", "delay", "fade", "none"])
def test_recirculations_with_an_energy_are_exact(kind: str) -> None:
    network = small_network(
        recirculation=kind,
        gamma=None if kind == "none" else 0.4,
        kappa=0.3,
        **turn(kind, 2),
    )
    assert cosine(network, beta=0.1) > 0.99999


@pytest.mark.parametrize("kappa", [0.1, 0.5])
def test_the_time_averaged_rule_of_gain_is_close(kappa: float) -> None:
    network = small_network(recirculation="gain", gamma=0.4, time=2.0, kappa=kappa, steps=200)
    inputs, targets = batch()
    used = probe.eqprop_gradient(network, inputs, targets, Learning(beta=0.05), torch.tensor(0.05))
    network.zero_grad()
    bptt(network, inputs, targets)
    exact = probe.flat_gradient(network)
    assert float((used - exact).norm() / exact.norm()) < 0.02


def test_gain_on_three_steps_a_period_has_the_gradient_of_the_continuous_orbit() -> None:
    """Against 25 steps of Heun: to a thousandth, where it was 1.006 of it."""
    inputs, targets = batch(2)

    def gradient(solver: str, step: float, count: int) -> Tensor:
        network = small_network(
            recirculation="gain",
            gamma=0.5,
            kappa=0.5,
            time=1.0,
            damping=1.5,
            name=solver,
            step=step,
            steps=1000,
            tolerance=1e-7,
        )
        assert network.recirculation.time_step(network.time_step)[0] == count
        bptt(network, inputs, targets)
        return probe.flat_gradient(network)

    coarse, fine = gradient("euler", 0.8, 3), gradient("heun", 0.08, 25)
    assert float(torch.cosine_similarity(coarse, fine, dim=0)) > 0.99999
    assert float(coarse.norm() / fine.norm()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("field", ["energy", "transformer"])
def test_the_exact_gradient_is_that_of_the_dense_oracle(field: str) -> None:
    network = _network(field, trained=True)
    inputs, targets = batch(3)
    found = probe.exact_gradient(network, inputs, targets)
    expected = torch.zeros_like(found)
    parameters = list(network.parameters())
    for image, target in zip(inputs, targets, strict=True):
        one, label = image[None], target[None]
        flow = network.free_flow(network.drive(one).detach())
        start = network.relax(network.drive(one).detach()).state
        rest = solve_equilibrium(flow, start)

        def cost(state: Tensor, label: Tensor = label) -> Tensor:
            return torch.nn.functional.cross_entropy(network.logits(state), label)

        def driven(state: Tensor, one: Tensor = one) -> Tensor:
            return network.flow(state, network.drive(one))

        gradients = implicit_gradient(driven, cost, rest, parameters)
        expected += torch.cat([g.flatten() for g in gradients]) / len(inputs)
    assert float((found - expected).norm() / expected.norm()) < 1e-7


def test_exact_and_nudged_gradients_against_finite_differences() -> None:
    network = _network("energy", trained=True)
    inputs, targets = batch(1)
    parameters = list(network.parameters())

    def loss() -> Tensor:
        costs = []
        for image, target in zip(inputs, targets, strict=True):
            drive = network.drive(image[None]).detach()
            rest = solve_equilibrium(network.free_flow(drive), network.relax(drive).state)
            costs.append(torch.nn.functional.cross_entropy(network.logits(rest), target[None]))
        return torch.stack(costs).mean()

    sizes = [p.numel() for p in parameters]
    generator = torch.Generator().manual_seed(0)
    indices = [
        (number, int(torch.randint(size, (), generator=generator)))
        for number, size in enumerate(sizes)
    ]
    differences = torch.as_tensor(
        finite_difference_gradient(loss, parameters, indices, eps=1e-5)
    ).double()
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    places = torch.tensor([starts[number] + place for number, place in indices])
    exact = probe.exact_gradient(network, inputs, targets)[places]
    nudged = probe.eqprop_gradient(
        network, inputs, targets, Learning(beta=0.05), torch.tensor(0.05, dtype=torch.float64)
    )[places]
    scale = differences.abs().max()
    assert float((exact - differences).abs().max() / scale) < 1e-6
    assert float((nudged - differences).abs().max() / scale) < 5e-3


@pytest.mark.parametrize("gradient", ["eqprop", "implicit", "adjoint", "bptt"])
def test_all_ways_agree(gradient: str) -> None:
    network = small_network(tolerance=1e-7, steps=40)
    inputs, targets = batch()
    exact = probe.exact_gradient(network, inputs, targets)
    EquilibriumLearner(Learning(gradient=gradient, beta=0.05)).gradients(network, inputs, targets)
    found = probe.flat_gradient(network)
    limit = 1e-3 if gradient == "eqprop" else 2e-4
    assert float((found - exact).norm() / exact.norm()) < limit


@pytest.mark.parametrize("gradient", ["eqprop", "implicit", "adjoint", "bptt"])
@pytest.mark.parametrize("field", ["energy", "transformer"])
def test_every_parameter_learns(gradient: str, field: str) -> None:
    network = small_network(torch.float32, field=field, tolerance=1e-5, steps=60)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    learner = EquilibriumLearner(Learning(gradient=gradient, beta=0.1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    inputs, targets = batch(dtype=torch.float32)
    learner.gradients(network, inputs, targets)
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert float(p.grad.abs().max()) > 0, name
    optimizer.step()
    for name, p in network.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_head_only_moves_the_head_alone() -> None:
    network = small_network()
    inputs, targets = batch()
    EquilibriumLearner(Learning(gradient="head")).gradients(network, inputs, targets)
    touched = {name for name, p in network.named_parameters() if p.grad is not None}
    assert touched == {"head.weight", "head.bias"}


def test_the_batch_size_does_not_dilute_the_nudge() -> None:
    """The cost is summed over samples: a mean would divide beta by the batch size."""
    network = small_network()
    inputs, targets = batch(4)
    learning, beta = Learning(beta=0.5, nudge="one_sided"), torch.tensor(0.5)
    once = probe.eqprop_gradient(network, inputs, targets, learning, beta)
    many = probe.eqprop_gradient(
        network, inputs.repeat(8, 1, 1, 1), targets.repeat(8), learning, beta
    )
    assert float((once - many).norm() / once.norm()) < 2e-3


def test_implicit_leaves_a_residual_below_its_tolerance() -> None:
    network = small_network()
    inputs, targets = batch()
    measured = implicit(network, free_phase(network, inputs, targets), relative=1e-8)
    assert float(measured["residual_nudged"]) < 1e-8
    assert math.isclose(float(measured["unconverged_share"]), 0.0)
