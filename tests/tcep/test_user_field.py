"""A user's own field, by import path, through all that a network does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tcep_cases import CLASSES, SIDE, batch, dynamics, turn
from topotune.errors import ConfigError
from topotune.tcep import probe
from topotune.tcep.fields import Capped, Field
from topotune.tcep.learner import EquilibriumLearner
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import Learning


class Springs(Field):
    """``E = 1/2 h A h - <u, h> + sum cosh(h w) - 1``: an energy and nothing else by hand.

    The features have a weight of their own, which the readout's cost reaches directly.
    """

    def __init__(self, tokens: int, width: int, caps: Any) -> None:
        super().__init__(tokens, width, tokens * width, tokens * width)
        self.bend = nn.Parameter(0.3 * torch.randn(width, 3) / width**0.5)
        self.root = nn.Parameter(0.2 * torch.randn(tokens * width, tokens * width))
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, tokens * width))
        self.cap: float = caps.memory

    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        pulled = (state @ self.root).square().sum(dim=1) / 2
        bent = (torch.cosh(self.split(state)[0] @ self.bend) - 1).sum(dim=(1, 2))
        return pulled + bent - (state * drive.flatten(1)).sum(dim=1)

    def features(self, state: Tensor) -> Tensor:
        return torch.tanh(self.gain * state)

    def capped(self) -> list[Capped]:
        return [Capped(self.root, self.cap)]


class Whirl(Field):
    """``u + tanh(h A)``: no energy."""

    conservative = False

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(tokens, width, tokens * width, tokens * width)
        self.weight = nn.Parameter(0.1 * torch.randn(self.size, self.size))

    def flow(self, state: Tensor, drive: Tensor) -> Tensor:
        return drive.flatten(1) + torch.tanh(state @ self.weight)

    def features(self, state: Tensor) -> Tensor:
        return state


class Still(Field):
    """``u``: a flow in the drive's own memory."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(tokens, width, tokens * width, tokens * width)

    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        return -(state * drive.flatten(1)).sum(dim=1)

    def flow(self, state: Tensor, drive: Tensor) -> Tensor:
        return drive.flatten(1)

    def features(self, state: Tensor) -> Tensor:
        return state


class Needy(Springs):
    def __init__(self, tokens: int, width: int, caps: Any, stiffness: float) -> None:
        super().__init__(tokens, width, caps)


class Misfit(Springs):
    def __init__(self, tokens: int, width: int, caps: Any) -> None:
        super().__init__(tokens, width + 1, caps)


class Choosy(Springs):
    def __init__(self, tokens: int, width: int, caps: Any) -> None:
        raise ValueError("the width must be prime")


def network(field: type[Field], dtype: torch.dtype = torch.float64, **changes: Any) -> TCEPNetwork:
    torch.manual_seed(0)
    settings = {"gamma": 0.2, "damping": 1.5, "tolerance": 1e-8, **changes}
    path = f"{__name__}:{field.__name__}"
    made = TCEPNetwork(1, SIDE, CLASSES, width=4, field=path, dynamics=dynamics(**settings))
    assert type(made.field) is field
    return made.to(dtype)


@pytest.mark.parametrize("field", [Springs, Whirl])
@pytest.mark.parametrize("kind", ["ring", "delay", "gain", "shift"])
def test_forward_and_its_unrolling(field: type[Field], kind: str) -> None:
    made = network(field, recirculation=kind, **turn(kind, 2)).eval()
    inputs, _ = batch(4)
    with torch.inference_mode():
        found = made(inputs)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(made(inputs).detach(), found, rtol=0, atol=1e-6)
    # what was first seen in inference mode can still be copied, and trained
    made(inputs).sum().backward()
    copy.deepcopy(made)


@pytest.mark.parametrize("gradient", ["eqprop", "implicit", "adjoint", "bptt"])
@pytest.mark.parametrize("field", [Springs, Whirl])
def test_all_gradients_are_that_of_the_loss(field: type[Field], gradient: str) -> None:
    # the adjoint method retraces the flow, which fails where it has contracted for long
    made = network(field, tolerance=1e-6, steps=14 if gradient == "adjoint" else 40)
    inputs, targets = batch(6)
    exact = probe.exact_gradient(made, inputs, targets)
    learner = EquilibriumLearner(Learning(gradient=gradient, beta=0.03))
    learner.check(made)
    learner.gradients(made, inputs, targets)
    learner.after_step(made)
    found = probe.flat_gradient(made)
    assert float((found - exact).norm() / exact.norm()) < 2e-3
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in made.parameters())


def test_the_exact_gradient_is_that_of_finite_differences() -> None:
    made = network(Springs, tolerance=1e-12, steps=3000)
    inputs, targets = batch(4)
    exact = probe.exact_gradient(made, inputs, targets)

    def loss() -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(made(inputs), targets))

    place = 0
    for parameter in made.parameters():
        flat, middle = parameter.data.view(-1), parameter.numel() // 2
        values = []
        for shift in (1e-5, -2e-5):
            flat[middle] += shift
            values.append(loss())
        flat[middle] += 1e-5
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(float(exact[place + middle]), rel=1e-4, abs=1e-8)
        place += parameter.numel()


@pytest.mark.parametrize("field", [Springs, Whirl])
def test_the_probe_knows_its_margins(field: type[Field]) -> None:
    made = network(field, torch.float32, tolerance=1e-5)
    inputs, targets = batch(5, torch.float32)
    learner = EquilibriumLearner(Learning(probe_cosine=True))
    found = learner.epoch_metrics(made, inputs, targets)
    assert found["gradient_cosine"] > 0.999
    assert found["stability_margin"] == pytest.approx(1.5 - 0.2 - found["one_sided_lipschitz"])
    curves = learner.relaxation(made, inputs)
    assert ("energy" in curves) == made.conservative
    assert curves["residual"][-1] < 1e-3 * curves["residual"][0]


def test_a_flow_that_is_the_drive_itself_is_not_written_into() -> None:
    found = network(Still, gamma=None, gamma_fraction=0.5)
    assert found.reference_mu == pytest.approx(0, abs=1e-9)
    assert found.recirculation.gamma == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (Needy, "the constructor of Needy needs 'stiffness'"),
        (Misfit, "Misfit has 6 tokens of width 5, expected 6 of 4"),
        (Choosy, "the width must be prime"),
    ],
)
def test_fields_that_do_not_fit(field: type[Field], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        network(field)
    assert caught.value.place == "field"
    assert text in str(caught.value)
