"""What the loop derives from per-step numbers, against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from topotune.train.measures import (
    SPIKE_MINIMUM,
    SPIKE_WINDOW,
    SpikeCounter,
    energy_limit,
    find_divergence,
    loss_roughness,
    peak_memory_mb,
)


def test_spikes_are_counted_against_the_running_median() -> None:
    # Median 1 throughout; 5.0 is not above 5 medians, 5.01 is, and a spike does not hide the next.
    assert SpikeCounter().count([1.0] * 10 + [5.0, 5.01, 100.0, 1.0]) == 2


def test_no_step_is_a_spike_before_enough_norms_are_known() -> None:
    quiet = [1.0] * (SPIKE_MINIMUM - 1)
    assert SpikeCounter().count([*quiet, 1e6]) == 0
    assert SpikeCounter().count([*quiet, 1.0, 1e6]) == 1


def test_an_even_number_of_norms_has_the_mean_of_the_middle_two_as_median() -> None:
    known = [1.0] * 5 + [3.0] * 5  # median 2
    assert SpikeCounter(known).count([9.9]) == 0
    assert SpikeCounter(known).count([10.1]) == 1


def test_the_median_forgets_what_left_the_window() -> None:
    counter = SpikeCounter([100.0] * SPIKE_WINDOW)
    assert counter.count([1.0] * SPIKE_WINDOW) == 0
    assert counter.window == [1.0] * SPIKE_WINDOW
    assert counter.count([6.0]) == 1


def test_the_counter_agrees_with_numpy_and_goes_on_from_its_window() -> None:
    norms = np.random.default_rng(0).lognormal(0.0, 1.5, 400)
    expected = sum(
        bool(norms[i] > 5.0 * np.median(norms[max(0, i - SPIKE_WINDOW) : i]))
        for i in range(SPIKE_MINIMUM, len(norms))
    )
    assert expected > 10
    first = SpikeCounter()
    found = first.count(norms[:137].tolist())
    second = SpikeCounter(first.window)
    assert found + second.count(norms[137:].tolist()) == expected


def test_roughness_against_a_hand_computed_value() -> None:
    # Changes -1, +1, -3: mean -1, population variance (0 + 4 + 4) / 3; mean loss 2.
    losses = [3.0, 2.0, 3.0, 0.0]
    assert loss_roughness(losses) == pytest.approx(math.sqrt(8 / 3) / 2.0, rel=1e-15)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([4.0, 3.0, 2.0, 1.0], 0.0),
        ([5.0], 0.0),
        ([5.0, 1.0], 0.0),
        ([-3.0, -2.0, -3.0, -0.0], math.sqrt(8 / 3) / 2.0),
        ([0.0, 0.0, 0.0], 0.0),
        ([1.0, -2.0, 1.0], math.inf),
    ],
    ids=["even descent", "one step", "two steps", "negative losses", "all zero", "mean zero"],
)
def test_roughness_where_a_quotient_could_mislead(losses: list[float], expected: float) -> None:
    assert loss_roughness(losses) == pytest.approx(expected)


def test_the_energy_limit_is_a_thousand_times_the_largest_target() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups: list[dict[str, Any]] = [
        {"params": [first], "target_energy": 1e-3},
        {"params": [second]},
    ]
    assert energy_limit(torch.optim.SGD(groups, lr=0.1)) == pytest.approx(1.0)
    groups[1]["target_energy"] = 2.0
    assert energy_limit(torch.optim.SGD(groups, lr=0.1)) == 2000.0
    assert energy_limit(torch.optim.SGD([first], lr=0.1)) is None


def _steps(**columns: list[float]) -> dict[str, np.ndarray]:
    return {name: np.asarray(values) for name, values in columns.items()}


def test_finite_steps_within_the_bound_are_no_divergence() -> None:
    steps = _steps(loss=[1.0, 2.0], grad_norm=[0.0, 1e30], energy=[1e20, 1e25])
    steps["energy_controlled"] = np.asarray([1.0, 1000.0])
    assert find_divergence(steps, 1, 1, 1000.0) is None


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"loss": [1.0, math.nan], "grad_norm": [1.0, 1.0]}, "loss is nan at step 42 (epoch 3)"),
        (
            {"loss": [1.0, math.nan], "grad_norm": [math.inf, math.nan]},
            "grad norm is inf at step 41 (epoch 3)",
        ),
        (
            {"loss": [1.0, 1.0], "energy": [-math.inf, 1.0]},
            "energy is -inf at step 41 (epoch 3)",
        ),
        (
            {"loss": [1.0, 1.0], "energy_controlled": [7.0, 1000.5]},
            "energy controlled 1000.5 at step 42 (epoch 3): above 1000 times its target 1",
        ),
        ({"loss": [1.0], "energy_controlled": [math.nan]}, "energy controlled is nan at step 41"),
    ],
)
def test_the_earliest_breach_is_named(columns: dict[str, list[float]], text: str) -> None:
    fault = find_divergence(_steps(**columns), 41, 3, 1000.0)
    assert fault is not None
    assert str(fault).startswith(text)


@pytest.mark.parametrize(
    ("known", "text"),
    [
        ((1, "the relaxation diverged"), "the relaxation diverged, at step 42 (epoch 3)"),
        ((0, "beta is zero"), "beta is zero, at step 41 (epoch 3)"),
        ((2, "what followed"), "loss is nan at step 42 (epoch 3)"),
    ],
)
def test_a_learners_cause_outranks_the_nan_that_it_led_to(
    known: tuple[int, str], text: str
) -> None:
    steps = _steps(loss=[1.0, math.nan, math.nan], grad_norm=[1.0, 1.0, 1.0])
    assert str(find_divergence(steps, 41, 3, None, known)) == text


def test_a_learners_cause_needs_no_nan() -> None:
    steps = _steps(loss=[1.0], grad_norm=[1.0])
    assert str(find_divergence(steps, 1, 1, None, (0, "no gradient"))).startswith("no gradient")


def test_the_bound_is_on_the_controlled_energy_only() -> None:
    steps = _steps(energy=[1e6], energy_controlled=[1e6])
    assert find_divergence(steps, 1, 1, None) is None
    del steps["energy_controlled"]
    assert find_divergence(steps, 1, 1, 1.0) is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the /proc of Linux")
def test_peak_memory_on_the_cpu_is_the_process_peak_in_megabytes() -> None:
    def high_water_mark() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        (kib,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        return kib / 1024

    before = high_water_mark()
    peak = peak_memory_mb(torch.device("cpu"))
    assert before * 0.99 <= peak <= high_water_mark() * 1.01
