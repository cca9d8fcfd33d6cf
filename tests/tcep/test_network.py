"""The network: tokens by hand, its forward pass against its equilibria, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tcep_cases import CLASSES, SIDE, batch, dynamics, small_network, turn
from topotune.errors import ConfigError, PluginError, UnknownNameError, UnstableError
from topotune.tcep import network as module
from topotune.tcep.fields import Field, build_field
from topotune.tcep.network import DEFAULT_FRACTION, TCEPNetwork
from topotune.tcep.options import RECIRCULATIONS, Caps, Dynamics
from topotune.tcep.relax import relax
from topotune.tcep.tokens import Tokens

# ---- tokens ----

NUMBERS = torch.arange(2)[:, None, None] * 100 + torch.arange(4)[:, None] * 10 + torch.arange(4)
"""Two channels of 4 by 4 pixels: 100 c + 10 y + x."""


@pytest.mark.parametrize(
    ("layout", "first", "last"),
    [
        ("rows", [0, 1, 2, 3, 100, 101, 102, 103], [30, 31, 32, 33, 130, 131, 132, 133]),
        ("columns", [0, 10, 20, 30, 100, 110, 120, 130], [3, 13, 23, 33, 103, 113, 123, 133]),
        ("patches", [0, 1, 10, 11, 100, 101, 110, 111], [22, 23, 32, 33, 122, 123, 132, 133]),
    ],
)
def test_tokens_by_hand(layout: str, first: list[int], last: list[int]) -> None:
    tokens = Tokens(layout, 2, 4, patch=2)
    found = tokens(torch.stack([NUMBERS, -NUMBERS]))
    assert found.shape == (2, tokens.count, tokens.size) == (2, 4, 8)
    assert found[0, 0].tolist() == first
    assert found[0, -1].tolist() == last
    assert torch.equal(found[1], -found[0])


def test_patches_go_row_by_row_and_hold_every_pixel_once() -> None:
    found = Tokens("patches", 2, 4, patch=2)(NUMBERS[None])
    assert found[0, 1].tolist() == [2, 3, 12, 13, 102, 103, 112, 113]
    assert found[0, 2].tolist() == [20, 21, 30, 31, 120, 121, 130, 131]
    assert sorted(found.flatten().tolist()) == sorted(NUMBERS.flatten().tolist())


@pytest.mark.parametrize(("patch", "count", "size"), [(1, 16, 2), (4, 1, 32)])
def test_patches_of_one_pixel_and_of_all(patch: int, count: int, size: int) -> None:
    assert Tokens("patches", 2, 4, patch)(NUMBERS[None]).shape == (1, count, size)


@pytest.mark.parametrize("layout", ["rows", "patches"])
def test_no_images_are_no_tokens(layout: str) -> None:
    assert Tokens(layout, 2, 4, 2)(torch.zeros(0, 2, 4, 4)).shape == (0, 4, 8)


# ---- forward ----


@pytest.mark.parametrize("field", ["energy", "transformer"])
@pytest.mark.parametrize("kind", RECIRCULATIONS)
def test_forward_reads_out_the_equilibrium(field: str, kind: str) -> None:
    gamma = None if kind == "none" else 0.2
    network = small_network(
        field=field,
        recirculation=kind,
        gamma=gamma,
        damping=1.5,
        tolerance=1e-8,
        **turn(kind, 2),
    ).eval()
    inputs, _ = batch(5)
    with torch.no_grad():
        plain = network(inputs)
    with torch.inference_mode():
        found = network(inputs)
    assert torch.equal(plain, found)
    assert found.shape == (5, CLASSES)
    drive = network.drive(inputs).detach()
    rest = network.relax(drive)
    assert bool(rest.converged.all())
    if kind != "gain":
        flow = network.flow(rest.state, drive).detach()
        assert float(flow.square().mean(dim=1).sqrt().max()) <= 1e-8
        torch.testing.assert_close(found, network.logits(rest.state), rtol=0, atol=1e-6)
    unrolled = network.train()(inputs)  # gradients are recorded
    assert unrolled.requires_grad
    torch.testing.assert_close(unrolled, found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 4, 5, 9])
@pytest.mark.parametrize("kind", ["ring", "gain"])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> None:
    network = small_network(recirculation=kind, gamma=0.2, tolerance=1e-7, **turn(kind, 2))
    inputs, _ = batch(9)
    with torch.no_grad():
        whole = network(inputs)
        monkeypatch.setattr(module, "CHUNK", 4)
        parts = network(inputs[:count])
    assert parts.shape == (count, CLASSES)
    torch.testing.assert_close(parts, whole[:count], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["ring", "gain"])
@pytest.mark.parametrize("recorded", [False, True])
def test_an_empty_batch_has_no_logits(kind: str, recorded: bool) -> None:
    network = small_network(torch.float32, recirculation=kind, gamma=0.2, **turn(kind, 2))
    with torch.set_grad_enabled(recorded):
        assert network(torch.zeros(0, 1, SIDE, SIDE)).shape == (0, CLASSES)


# ---- the dynamics as a whole ----


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("kind", ["ring", "none"])
@pytest.mark.parametrize("wild", [False, True])
def test_energy_never_rises_along_a_relaxation(solver: str, kind: str, wild: bool) -> None:
    gamma = None if kind == "none" else 0.4
    network = small_network(recirculation=kind, gamma=gamma, name=solver, step=0.15, steps=80)
    if wild:
        with torch.no_grad():
            for parameter in network.field.parameters():
                parameter.mul_(3)
    drive = network.drive(batch(6)[0]).detach()
    start = network.field.initial(drive)
    found = relax(
        network.free_flow(drive),
        start,
        network.dynamics.solver,
        dt=network.time_step,
        energy=lambda state: network.energy(state, drive).detach(),
    )
    assert found.energy is not None
    change = found.energy.diff(dim=0)
    assert float(change.max()) <= 1e-13 * float(found.energy.abs().max())
    assert float((found.energy[0] - found.energy[-1]).min()) > 1e-2


@pytest.mark.parametrize("period", [0.1, 2, 16])
@pytest.mark.parametrize("kind", ["delay", "fade"])
def test_the_past_leads_to_the_network_without_it_at_lambda_eff(kind: str, period: float) -> None:
    network = small_network(
        recirculation=kind, gamma=0.5, kappa=0.1, time=period, damping=1.5, steps=4000
    )
    share = math.exp(-0.1 * period) if kind == "delay" else 1 - math.exp(-0.1 * period)
    bare = small_network(recirculation="none", damping=1.5 - 0.5 * share, tolerance=1e-9)
    bare.load_state_dict(network.state_dict())
    drive = network.drive(batch(3)[0]).detach()
    found, expected = network.relax(drive), bare.relax(drive)
    assert bool(found.converged.all())
    assert bool(expected.converged.all())
    torch.testing.assert_close(found.state, expected.state, rtol=0, atol=3e-5)
    far = small_network(recirculation="none", damping=1.5).relax(drive).state
    assert float((far - expected.state).abs().max()) > 1e-2


# ---- gamma ----


@pytest.mark.parametrize("fraction", [0.0, 0.9, None])
@pytest.mark.parametrize("field", ["energy", "transformer"])
def test_gamma_is_a_share_of_lambda_less_mu(field: str, fraction: float | None) -> None:
    network = small_network(torch.float32, field=field, gamma_fraction=fraction, damping=2.0)
    share = DEFAULT_FRACTION if fraction is None else fraction
    assert 0 < network.reference_mu < 2.0
    assert network.recirculation.gamma == share * (2.0 - network.reference_mu)
    assert network.resolved()["resolved.gamma"] == network.recirculation.gamma
    again = small_network(torch.float32, field=field, gamma_fraction=fraction, damping=2.0)
    assert again.reference_mu == network.reference_mu


def test_finding_gamma_draws_no_random_number_and_moves_no_weight() -> None:
    found = small_network(gamma_fraction=0.5)
    after = torch.get_rng_state()
    given = small_network(gamma=0.1)
    assert torch.equal(torch.get_rng_state(), after)
    for name, value in given.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_gamma_is_zero_where_lambda_leaves_no_range() -> None:
    caps = Caps(attention=6.0, memory=6.0, hidden=60.0)
    network = small_network(damping=0.3, gamma_fraction=0.9, caps=caps)
    assert network.reference_mu > 0.3
    assert network.recirculation.gamma == 0.0


def test_zeros_among_the_capped_weights_do_not_hinder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many start their last matrix at zero."""

    def zeroed(*given: Any) -> Field:
        field = build_field(*given)
        torch.nn.init.zeros_(field.capped()[0].weight)
        return field

    monkeypatch.setattr("topotune.tcep.network.build_field", zeroed)
    assert 0 < small_network(gamma_fraction=0.5).recirculation.gamma < 1


# ---- copies ----


def test_a_network_that_was_trained_can_be_copied() -> None:
    network = small_network()
    inputs, _ = batch(3)
    network(inputs).sum().backward()
    with torch.inference_mode():
        network(inputs)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for weight, _, _ in twin.field.capped():
            weight.mul_(5)
        before = [c.weight.clone() for c in network.field.capped()]
        twin.caps()
        norm = torch.linalg.matrix_norm(twin.field.capped()[-1].weight, ord=2)
    assert float(norm) == pytest.approx(network.dynamics.caps.hidden, rel=0.05)
    for (weight, _, _), old in zip(network.field.capped(), before, strict=True):
        assert torch.equal(weight, old)


# ---- what is refused ----


def refused(**sizes: Any) -> TCEPNetwork:
    given = {"width": 8, "hidden": 4, "memory": 3, "dynamics": dynamics(gamma=0.1), **sizes}
    return TCEPNetwork(1, SIDE, CLASSES, **given)


@pytest.mark.parametrize(
    ("sizes", "error", "text"),
    [
        ({"heads": 3}, ConfigError, "model.heads: must divide the width 8 (got 3)"),
        ({"heads": 0}, ConfigError, "model.heads: must be a whole number, at least 1 (got 0)"),
        ({"width": 8.0}, ConfigError, "model.width: must be a whole number"),
        ({"width": 1, "heads": 1}, ConfigError, "model.width: must be at least 2"),
        ({"hidden": True}, ConfigError, "model.hidden: must be a whole number"),
        ({"memory": -1}, ConfigError, "model.memory: must be"),
        ({"patch": 4, "tokens": "patches"}, ConfigError, "model.patch: must divide"),
        ({"patch": 6, "tokens": "patches"}, ConfigError, "at least 2 tokens (got 1)"),
        ({"tokens": "row"}, UnknownNameError, "did you mean 'rows'?"),
        ({"field": "energie"}, UnknownNameError, "did you mean 'energy'?"),
        ({"field": 3}, UnknownNameError, "unknown field '3'"),
        ({"field": ["energy"]}, UnknownNameError, "unknown field"),
        ({"field": "no_such_module:Field"}, PluginError, "no_such_module"),
        ({"field": "tests.tcep_cases:batch"}, PluginError, "expected a subclass"),
        ({"dynamics": "ring"}, ConfigError, "model.dynamics: is no model option"),
        ({"dynamics": Dynamics(gamma=0.1, period=7)}, ConfigError, "T: must be a whole number"),
        ({"dynamics": Dynamics(gamma=0.1, period=2.5)}, ConfigError, "2 to 6, for"),
        ({"dynamics": Dynamics(gamma=1.0)}, UnstableError, "lambda: must be above |gain| = 1"),
        ({"dynamics": Dynamics(gamma=-1.5)}, UnstableError, "gamma -1.5"),
        (
            {"dynamics": Dynamics(recirculation="delay", gamma=0.1, time=1e6)},
            ConfigError,
            "T_time: must be at most 10000 steps",
        ),
    ],
)
def test_sizes_and_dynamics_that_do_not_fit(
    sizes: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        refused(**sizes)
    assert text in str(caught.value)


def test_images_without_pixels_make_no_sequence() -> None:
    with pytest.raises(ConfigError, match=r"images of 1 channels and 0 pixels .* no sequence"):
        TCEPNetwork(1, 0)


@pytest.mark.parametrize("shape", [(2, SIDE, SIDE), (2, 3, SIDE, SIDE), (2, 1, SIDE, 5), (2,)])
@pytest.mark.parametrize("recorded", [False, True])
def test_inputs_of_another_shape(shape: tuple[int, ...], recorded: bool) -> None:
    with torch.set_grad_enabled(recorded), pytest.raises(ConfigError) as caught:
        refused()(torch.zeros(shape))
    assert f"shape (n, 1, {SIDE}, {SIDE}) (got {shape})" in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_no_numbers(bad: float) -> None:
    inputs: Tensor = torch.zeros(5, 1, SIDE, SIDE)
    inputs[1, 0, 2, 3] = inputs[4, 0, 0, 0] = inputs[4, 0, 0, 1] = bad
    with torch.inference_mode(), pytest.raises(ConfigError, match="2 of 5 samples hold NaN or inf"):
        refused()(inputs)


# ---- export ----


@pytest.mark.parametrize(
    ("field", "kind", "recorded"), [("energy", "ring", False), ("transformer", "gain", True)]
)
def test_an_exported_network_gives_the_same_logits(field: str, kind: str, recorded: bool) -> None:
    """For batches of any size; the network itself is as it was."""
    network = small_network(
        torch.float32, field=field, recirculation=kind, gamma=0.2, steps=5, tolerance=1e-2
    ).eval()
    inputs, _ = batch(7, torch.float32)
    sizes = ({0: torch.export.Dim("rows", min=1, max=64)},)
    with torch.set_grad_enabled(recorded):
        exported = torch.export.export(network, (inputs[:3],), dynamic_shapes=sizes).module()
    with torch.no_grad():
        for count in (1, 3, 7):
            expected = network(inputs[:count])
            torch.testing.assert_close(exported(inputs[:count]), expected, rtol=0, atol=1e-5)
