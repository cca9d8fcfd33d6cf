"""Samples that do not settle: their weight in a gradient is zero, whatever state they reached.

The oracle is the gradient of the settled samples alone, taken by the same learner.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tcep_cases import CLASSES, SIDE, batch, dynamics
from topotune.errors import ConfigError
from topotune.tcep import probe
from topotune.tcep.fields import Field
from topotune.tcep.gradients import free_phase
from topotune.tcep.learner import EquilibriumLearner
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import GRADIENTS, Learning
from topotune.tcep.relax import Status

SAMPLES = 16
ODD = 5
"""The sample that does not settle."""


class Notch(Field):
    """``E = -<u, h> + sum log cosh(sharp h)``: so steep near zero that an Euler step overshoots,
    and forever. A drive that carries the tokens away from zero finds no curvature at all."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(tokens, width, tokens * width, tokens * width)
        self.sharp = nn.Parameter(torch.full((tokens * width,), 2.5))
        self.mix = nn.Parameter(0.01 * torch.randn(tokens * width, tokens * width))

    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        bent = self.sharp * state
        steep = (bent.abs() + torch.log1p(torch.exp(-2 * bent.abs())) - math.log(2)).sum(dim=1)
        return steep - (state * (drive.flatten(1) + torch.tanh(state @ self.mix))).sum(dim=1)

    def features(self, state: Tensor) -> Tensor:
        return state


class Cliff(Notch):
    """With a pit beyond which nothing holds: a state far out leaves the finite numbers."""

    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        return super().energy(state, drive) - (state / 100).pow(8).sum(dim=1)


class Turning(Notch):
    """Without an energy: the same flow, and each number drives the next one."""

    conservative = False

    def flow(self, state: Tensor, drive: Tensor) -> Tensor:
        pull = drive.flatten(1) - self.sharp * torch.tanh(self.sharp * state)
        return pull + torch.tanh(torch.roll(state, 1, dims=1) @ self.mix)


def network(field: type[Field] = Notch, **changes: Any) -> TCEPNetwork:
    """A network whose drive is 6 times the image's first column, repeated."""
    torch.manual_seed(0)
    settings = {"gamma": 0.1, "name": "euler", "steps": 150, "tolerance": 1e-8, **changes}
    path = f"{__name__}:{field.__name__}"
    made = TCEPNetwork(
        1, SIDE, CLASSES, width=4, field=path, dynamics=dynamics(**settings)
    ).double()
    with torch.no_grad():
        made.position.zero_()
        made.embed.weight.zero_()
        made.embed.weight[:, 0] = 6.0
    return made


def images(odd: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Bright images with a sign of their own a row; ``ODD`` is so bright everywhere."""
    _, targets = batch(SAMPLES)
    generator = torch.Generator().manual_seed(3)
    found = torch.rand(SAMPLES, 1, SIDE, SIDE, generator=generator, dtype=torch.float64) + 0.7
    found *= torch.where(torch.rand(SAMPLES, 1, SIDE, 1, generator=generator) < 0.5, -1.0, 1.0)
    found[ODD] = odd
    return found, targets


def gradient(made: TCEPNetwork, learner: EquilibriumLearner, *rows: Tensor) -> Tensor:
    made.zero_grad()
    learner.gradients(made, *rows)
    return probe.flat_gradient(made)


def others() -> Tensor:
    return torch.arange(SAMPLES) != ODD


@pytest.mark.parametrize("field", [Notch, Turning])
@pytest.mark.parametrize(
    "learning",
    [
        Learning(),
        Learning(nudge="one_sided"),
        Learning(beta="learned"),
        Learning(correction=False),
        Learning(gradient="implicit"),
        Learning(gradient="head"),
    ],
    ids=str,
)
def test_a_sample_that_never_settles_has_no_weight(learning: Learning, field: type[Field]) -> None:
    made, learner = network(field), EquilibriumLearner(learning)
    if learning.beta == "learned" and not made.conservative:
        with pytest.raises(ConfigError):
            learner.check(made)
        return
    inputs, targets = images()
    status = free_phase(made, inputs, targets).free.status
    assert status.tolist() == [Status.UNCONVERGED if i == ODD else 0 for i in range(SAMPLES)]
    alone = gradient(made, EquilibriumLearner(learning), inputs[others()], targets[others()])
    found = gradient(made, learner, inputs, targets)
    assert float(alone.norm()) > 1e-3
    torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-13)
    measured = learner.gradients(made, inputs, targets).measured
    assert float(measured["unconverged_share"]) == pytest.approx(1 / SAMPLES)
    assert float(measured["diverged_share"]) == 0


@pytest.mark.parametrize("kind", ["shift", "delay", "gain"])
def test_nor_with_any_recirculation(kind: str) -> None:
    made = network(recirculation=kind, tolerance=1e-6, steps=300)
    inputs, targets = images()
    found = gradient(made, EquilibriumLearner(Learning()), inputs, targets)
    rest = inputs[others()], targets[others()]
    alone = gradient(made, EquilibriumLearner(Learning()), *rest)
    assert float(alone.norm()) > 1e-3
    torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("gradient_", ["eqprop", "implicit", "head"])
def test_a_sample_that_diverges_has_no_weight(gradient_: str) -> None:
    """A trial ends at it; whoever goes on by hand does so with a sound gradient."""
    made, learning = network(Cliff), Learning(gradient=gradient_)
    inputs, targets = images(50.0)
    learner = EquilibriumLearner(learning)
    found = gradient(made, learner, inputs, targets)
    alone = gradient(made, EquilibriumLearner(learning), inputs[others()], targets[others()])
    torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-13)
    measured = learner.gradients(made, inputs, targets).measured
    assert float(measured["diverged_share"]) == pytest.approx(1 / SAMPLES)


@pytest.mark.parametrize("nudge", ["symmetric", "one_sided"])
def test_a_nudge_that_does_not_settle_counts_as_well(nudge: str) -> None:
    """At rest on the steep spot as long as nothing nudges it away."""
    made, learning = network(), Learning(nudge=nudge)
    inputs, targets = images(0.0)
    assert bool(free_phase(made, inputs, targets).free.converged.all())
    learner = EquilibriumLearner(learning)
    found = gradient(made, learner, inputs, targets)
    alone = gradient(made, EquilibriumLearner(learning), inputs[others()], targets[others()])
    # It does take part in the nudge's tolerance, as its free phase settled.
    torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-9)
    measured = learner.gradients(made, inputs, targets).measured
    assert float(measured["unconverged_share"]) == pytest.approx(1 / SAMPLES)


def test_a_sample_far_out_does_not_decide_how_far_the_others_relax() -> None:
    """Its size would pass for the rounding that a relaxation has to live with."""
    made = network(Cliff).float()
    inputs, targets = images(20.0)
    inputs = inputs.float()
    learner = EquilibriumLearner(Learning())
    both = learner.gradients(made, inputs, targets).measured
    alone = learner.gradients(made, inputs[others()], targets[others()]).measured
    for name in ("nudge_force", "nudge_resolution"):
        assert float(both[name]) == pytest.approx(float(alone[name]), rel=1e-5), name


@pytest.mark.parametrize("gradient_", ["eqprop", "implicit", "head"])
def test_where_none_settles_there_is_no_gradient(gradient_: str) -> None:
    made = network(steps=5)
    inputs, targets = images()
    learner = EquilibriumLearner(Learning(gradient=gradient_))
    found = learner.gradients(made, inputs, targets)
    assert all(parameter.grad is None for parameter in made.parameters())
    assert bool(torch.isfinite(found.loss))
    assert {name for name, value in found.measured.items() if not bool(value.isfinite())} == set()
    assert float(found.measured["unconverged_share"]) == 1.0


def test_a_learned_beta_learns_nothing_of_a_batch_that_does_not_settle() -> None:
    made, (inputs, targets) = network(steps=5), images()
    learner = EquilibriumLearner(Learning(beta="learned"))
    learner.gradients(made, inputs, targets)
    assert learner.beta == pytest.approx(0.1)


def test_noise_leaves_none_settled_and_all_count() -> None:
    made, (inputs, targets) = network(), images(1.5)
    learning = Learning(noise="gaussian", noise_level=1e-9)
    torch.manual_seed(0)
    noisy = gradient(made, EquilibriumLearner(learning), inputs, targets)
    plain = gradient(made, EquilibriumLearner(Learning()), inputs, targets)
    assert float((noisy - plain).norm() / plain.norm()) < 1e-4


@pytest.mark.parametrize("gradient_", GRADIENTS)
def test_an_empty_batch_is_refused(gradient_: str) -> None:
    made, (inputs, targets) = network(), images()
    learner = EquilibriumLearner(Learning(gradient=gradient_))
    with pytest.raises(ConfigError, match="model input: must be at least one sample"):
        learner.gradients(made, inputs[:0], targets[:0])
