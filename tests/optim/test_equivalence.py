"""The fast path follows the literal recursion."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.optim_cases import COUPLINGS, SHAPES, compare, parameters, replay
from topotune.optim import TopologicalAdam, fields
from topotune.optim.couplings import ACCURACY, degree_for, polynomial, shifted, taylor

CONTROLS = ("exact", "band")
SCALES = (1e-3, 1.0, 30.0)
CELLS = list(itertools.product(COUPLINGS, CONTROLS, SCALES))
BOTH = list(itertools.product(COUPLINGS, CONTROLS))
OVERFLOWING = [("uniform", "band", 30.0), ("local", "band", 30.0)]
BOUNDED = [cell for cell in CELLS if cell not in OVERFLOWING]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("coupling", "control", "scale"), BOUNDED)
def test_float64_equals_the_twin(coupling: str, control: str, scale: float, inside: bool) -> None:
    # The fields do not see eps: its other placement needs no more than one tensor.
    shapes = SHAPES[:1] if inside else SHAPES
    found = compare(
        torch.float64,
        scale,
        shapes=shapes,
        coupling=coupling,
        energy_control=control,
        eps_inside_sqrt=inside,
    )
    assert found.error <= 1e-10


@pytest.mark.parametrize(("coupling", "control", "scale"), BOUNDED)
def test_float32_equals_the_float64_twin(coupling: str, control: str, scale: float) -> None:
    found = compare(
        torch.float32, scale, coupling=coupling, energy_control=control, eps_inside_sqrt=False
    )
    assert found.error <= 1e-5


def test_float32_local_coupling_overflows_under_large_gradients_and_says_so() -> None:
    found = compare(torch.float32, 30.0, coupling="local", energy_control="band")
    assert not math.isfinite(found.fast.metrics()["energy"])
    assert found.worst_energy > 1e100


def test_float64_local_coupling_follows_the_twin_far_beyond_its_target() -> None:
    found = compare(torch.float64, 30.0, coupling="local", energy_control="band")
    assert found.error <= 1e-10
    assert found.worst_energy > 1e100
    assert found.fast.metrics()["energy"] > 1e100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_band_does_not_hold_uniform_under_large_gradients_and_says_so(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"coupling": "uniform", "energy_control": "band"}
    early = compare(dtype, 30.0, steps=100, shapes=SHAPES[:1], **options)
    assert early.worst_energy > 1e10
    assert early.fast.metrics()["energy_controlled"] > 1e10
    late = compare(dtype, 30.0, steps=600, shapes=SHAPES[:1], **options)
    assert not math.isfinite(late.worst_energy)
    assert not math.isfinite(late.fast.metrics()["energy"])


def test_large_parameters_lose_what_float32_rounding_of_the_parameter_costs() -> None:
    """Around 1, a correction of 5e-6 is some 40 units of the last place, rounded in each step."""
    small = compare(torch.float32, 1.0, shapes=SHAPES[:1])
    large = compare(torch.float32, 1.0, size=1.0, shapes=SHAPES[:1])
    assert small.error < 1e-5 < large.error < 1e-3


@pytest.mark.parametrize(("coupling", "control"), BOTH)
@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True, "weight_decay": 0.1},
        {"field_init": "normal", "field_seed": 3, "betas": (0.5, 0.9)},
        {"foreach": False, "eps": 1e-3, "eps_inside_sqrt": True},
        {"foreach": True, "mu0": 0.1, "w_topo": 1.5, "target_energy": 0.1},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_reach_the_fast_path(coupling: str, control: str, options: dict[str, Any]) -> None:
    found = compare(
        torch.float64, 0.3, steps=20, coupling=coupling, energy_control=control, **options
    )
    assert found.error <= 1e-10


@pytest.mark.parametrize(("coupling", "control"), BOTH)
def test_the_path_of_other_devices_equals_the_twin(
    coupling: str, control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where numbers may not be read by the host, torch does the small sums."""
    monkeypatch.setattr(fields, "host_readable", lambda device: False)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        found = compare(dtype, 1.0, steps=80, coupling=coupling, energy_control=control)
        assert not next(iter(found.fast._plans.values())).batches[0].fields.on_cpu  # type: ignore[union-attr]
        assert found.error <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(
    ("size", "factor"),
    [(0.04, 1.0), (0.04, 1e-3), (0.04, 0.0), (0.3, 1.0), (2.0, 30.0)],
    ids=["degree 2", "degree 1", "degree 0", "degree 3", "sigmoid"],
)
def test_correction_of_large_tensors_is_tanh_of_the_fields(
    coupling: str, dtype: torch.dtype, size: float, factor: float
) -> None:
    """Tensors beyond the size that has tricks of its own, beside one below it."""
    values = [size * torch.linspace(-1, 1, 20_000).view(100, 200), torch.linspace(0, size, 7)]
    tensors = parameters(values, dtype)
    optimizer = TopologicalAdam(tensors, coupling=coupling)
    replay(optimizer, tensors, [[1e-3 * torch.sin(9 * value) for value in values]])
    fields = next(iter(optimizer._plans.values())).batches[0].fields
    assert fields is not None
    fields.coefficient_rows[0] *= factor
    moved = [torch.zeros_like(value, dtype=dtype) for value in values]
    fields.add_correction(moved, 1.0)
    for tensor, correction in zip(tensors, moved, strict=True):
        alpha, beta = optimizer.fields(tensor)
        expected = torch.tanh(alpha.double() - beta.double())
        bound = 3e-7 if dtype is torch.float32 else 1e-15
        assert (correction.double() - expected).abs().max().item() <= bound


def test_energy_trace_follows_the_twin() -> None:
    found = compare(torch.float64, 1.0, steps=50, coupling="exchange", energy_control="band")
    trace = found.fast.energy_trace()
    states = list(found.twin.state.values())
    for name, key in (
        ("energy", "energy"),
        ("energy_controlled", "energy_controlled"),
        ("coupling_current", "current"),
    ):
        expected = sum(float(state[key]) for state in states) / len(SHAPES)
        assert getattr(trace, name)[-1].item() == pytest.approx(expected, rel=1e-9)


@given(
    centre=st.floats(-6.0, 6.0),
    reach=st.floats(0.0, 0.03),
    scale=st.floats(0.01, 20.0),
    middle=st.floats(-0.1, 0.1),
)
@settings(max_examples=120, deadline=None)
def test_polynomials_keep_their_accuracy(
    centre: float, reach: float, scale: float, middle: float
) -> None:
    degree = degree_for(reach)
    if degree is None:
        assert reach > 0.024
        return
    distances = torch.linspace(-reach, reach, 101, dtype=torch.float64)
    exact = torch.tanh(centre + distances)
    if degree == 0:
        found = torch.full_like(exact, taylor(centre, 0)[0])
    else:
        points = middle + distances / scale
        found = polynomial(points, shifted(taylor(centre, degree), scale, middle))
    assert (found - exact).abs().max().item() <= ACCURACY * 1.001


@pytest.mark.parametrize("reach", [math.nan, math.inf, 0.1])
def test_no_polynomial_where_none_is_accurate(reach: float) -> None:
    assert degree_for(reach) is None
