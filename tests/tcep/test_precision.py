"""Low precision around a relaxation: switched off inside, refused in the parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.tcep_cases import CLASSES, SIDE, batch, dynamics, small_network
from topotune.errors import ConfigError
from topotune.tcep import probe
from topotune.tcep.fields import Field
from topotune.tcep.learner import EquilibriumLearner
from topotune.tcep.network import TCEPNetwork
from topotune.tcep.options import GRADIENTS, Learning
from topotune.tcep.precision import SWITCHES
from topotune.tcep.relax import relax, unroll

LOW = [torch.bfloat16, torch.float16]


def network(field: str = "energy", steps: int = 60) -> TCEPNetwork:
    return small_network(torch.float32, field=field, gamma=0.2, tolerance=1e-5, steps=steps)


def gradient(made: TCEPNetwork, learning: Learning) -> Tensor:
    made.zero_grad()
    EquilibriumLearner(learning).gradients(made, *batch(dtype=torch.float32))
    return probe.flat_gradient(made)


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("field", ["energy", "transformer"])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_autocast_changes_no_bit_of_a_gradient(kind: str, field: str, low: torch.dtype) -> None:
    made, learning = network(field, steps=12 if kind == "adjoint" else 60), Learning(gradient=kind)
    plain = gradient(made, learning)
    with torch.autocast("cpu", low):
        assert torch.equal(gradient(made, learning), plain)
        assert torch.is_autocast_enabled("cpu")
    assert float(plain.norm()) > 0.01


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.22])
def test_the_cosine_under_autocast(beta: float) -> None:
    made = network()
    inputs, targets = batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = probe.gradient_cosine(made, inputs, targets, Learning(), torch.tensor(beta))
    assert found > 0.999


def test_all_else_is_the_same_under_autocast() -> None:
    inputs, targets = batch(dtype=torch.float32)

    def everything() -> dict[str, object]:
        made = network()
        learner = EquilibriumLearner(Learning(probe_cosine=True))
        unrolled = made(inputs)
        with torch.no_grad():
            logits = made.eval()(inputs)
            for weight, _, _ in made.field.capped():
                weight.mul_(3)
        learner.after_step(made)
        return {
            "unrolled": unrolled,
            "logits": logits,
            **made.state_dict(),
            **learner.epoch_metrics(made, inputs, targets),
            **{k: torch.from_numpy(v) for k, v in learner.relaxation(made, inputs).items()},
        }

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        found = everything()
    assert plain.keys() == found.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def test_gamma_is_resolved_in_full_precision() -> None:
    plain = small_network(torch.float32, gamma_fraction=0.5).resolved()
    with torch.autocast("cpu", torch.bfloat16):
        assert small_network(torch.float32, gamma_fraction=0.5).resolved() == plain


@pytest.mark.parametrize("low", LOW, ids=str)
def test_inputs_of_fewer_bits_are_raised(low: torch.dtype) -> None:
    made, (inputs, _) = network().eval(), batch(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(made(inputs.to(low)), made(inputs.to(low).float()))


class Bare:
    """``u - s W``: a flow of the caller's own."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, state: Tensor) -> Tensor:
        return 1.0 - state @ self.weight

    def rows(self, index: Tensor) -> Bare:
        return self


def test_relaxing_alone_is_in_full_precision() -> None:
    flow, start = Bare(torch.eye(40) + 0.01 * torch.ones(40, 40)), torch.zeros(2, 40)
    solver = dynamics(tolerance=1e-6).solver
    plain = relax(flow, start, solver, dt=0.5).state
    steps = unroll(flow, start, solver, dt=0.5)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(relax(flow, start, solver, dt=0.5).state, plain)
        assert torch.equal(unroll(flow, start, solver, dt=0.5)[0], steps)


class Seen(Field):
    """``u``, and a note of what products are rounded to."""

    seen: ClassVar[set[tuple[str, ...]]] = set()

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(tokens, width, tokens * width, tokens * width)
        self.weight = nn.Parameter(torch.ones(tokens * width))

    def energy(self, state: Tensor, drive: Tensor) -> Tensor:
        self.seen.add(switches())
        return -(self.weight * state * drive.flatten(1)).sum(dim=1)

    def features(self, state: Tensor) -> Tensor:
        return state


def switches() -> tuple[str, ...]:
    return tuple(switch.fp32_precision for switch in SWITCHES)


@contextmanager
def lowered(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_inside_are_not_rounded_further_than_float32(precision: str) -> None:
    """TF32 and bfloat16 within products are off inside, and as they were afterwards."""
    torch.manual_seed(0)
    path = f"{__name__}:Seen"
    made = TCEPNetwork(1, SIDE, CLASSES, width=4, field=path, dynamics=dynamics(gamma=0.1))
    inputs, targets = batch(4, torch.float32)
    Seen.seen.clear()
    with lowered(precision):
        before = switches()
        EquilibriumLearner(Learning()).gradients(made, inputs, targets)
        made.eval()(inputs)
        assert switches() == before
        with pytest.raises(ConfigError, match="must be images"):
            made(inputs[0])
        assert switches() == before
        assert torch.get_float32_matmul_precision() == precision
    assert Seen.seen == {("ieee",) * 4}


@pytest.mark.parametrize("low", [*LOW, torch.float8_e4m3fn], ids=str)
def test_parameters_of_fewer_bits_are_refused(low: torch.dtype) -> None:
    inputs, targets = batch(dtype=torch.float32)
    kind = str(low).removeprefix("torch.")
    whole = network()
    one = copy.deepcopy(whole)
    one.field.memory.data = one.field.memory.data.to(low)
    for made, name in ((whole.to(low), "position"), (one, r"field\.memory")):
        rule = rf"parameter {name}: must be float32 or float64 .*\(got {kind}\).*Keep the model"
        with pytest.raises(ConfigError, match=rule):
            EquilibriumLearner(Learning()).gradients(made, inputs, targets)
        with pytest.raises(ConfigError, match=rule), torch.no_grad():
            made(inputs)


def test_a_network_built_of_fewer_bits_is_refused() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(ConfigError, match="must be float32 or float64"):
            TCEPNetwork(1, SIDE, CLASSES, width=8, hidden=12, memory=10)
    finally:
        torch.set_default_dtype(torch.float32)
