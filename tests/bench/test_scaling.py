"""``topotune bench scaling``: its arithmetic on runs with exact answers, and a real quick run."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from topotune.bench.scaling.command import Options
from topotune.bench.scaling.numbers import (
    Cost,
    Epoch,
    Load,
    Sample,
    Spread,
    fit,
    pauses,
    slot_trials,
    spent,
    steady,
)
from topotune.bench.scaling.run import Plan
from topotune.cli.main import app


def slot(worker: int, start: float, trials: int, epochs: int, sleep: float, within: float,
         between: float) -> list[Epoch]:  # fmt: skip
    """The epochs of a slot that works like a clock."""
    found, now = [], start
    for _ in range(trials):
        for _ in range(epochs):
            found.append(Epoch(worker, now, now + sleep))
            now += sleep + within
        now += between - within
    return found


def test_slots_that_start_at_different_times_give_the_sum_of_their_rates() -> None:
    # Two epochs of 1 s with 0.25 s between them, 0.75 s to the next trial: a trial takes 3 s.
    early = slot(1, 0.0, 9, 2, 1.0, 0.25, 0.75)
    late = slot(2, 7.5, 6, 2, 1.0, 0.25, 0.75)
    window = steady([*late, *early], 2)
    assert window.rate == pytest.approx(2 / 3)
    assert window.begin == pytest.approx(7.5 + 2.25)  # the late one's first trial is over
    assert window.end == pytest.approx(max(early[-1].end, late[-1].end))
    ends = [trial.end for trial in slot_trials([*early, *late], 2)]
    assert window.trials == sum(end > window.begin for end in ends) == 11
    between, within = pauses([*early, *late], 2, since=0.0)
    assert between == pytest.approx([0.75] * (8 + 5))
    assert within == pytest.approx([0.25] * (9 + 6))
    assert len(pauses(early, 2, since=early[-3].end)[0]) == 1


@pytest.mark.parametrize("left", [0, 1])
def test_a_slot_with_too_few_trials_gives_no_rate(left: int) -> None:
    early = slot(1, 0.0, 1 + left, 1, 1.0, 0.0, 0.5)
    late = slot(2, 1.0, 5, 1, 1.0, 0.0, 0.5)
    with pytest.raises(ValueError, match="--trials"):
        steady([*early, *late], 1)


def test_half_a_trial_is_refused() -> None:
    with pytest.raises(ValueError, match="worker 3 slept 3 epochs, of 2 a trial"):
        slot_trials(slot(3, 0.0, 3, 1, 1.0, 0.0, 0.0), 2)


def test_cpu_time_is_taken_between_the_samples() -> None:
    samples = [Sample(float(t), {"driver": 2.0 * t, "ray": 0.0}) for t in range(5)]
    assert spent(samples, "driver", 0.5, 3.25) == pytest.approx(5.5)
    assert spent(samples, "ray", 0.5, 3.25) == 0.0


def test_the_cost_of_a_second_a_trial_and_an_epoch_are_told_apart() -> None:
    loads = [
        Load(seconds, trials, epochs, 0.1 * seconds + 0.2 * trials + 0.01 * epochs)
        for seconds, trials, epochs in ((20, 8, 32), (30, 40, 160), (25, 80, 80))
    ]
    cost = fit(loads)
    assert (cost.second, cost.trial, cost.epoch) == pytest.approx((0.1, 0.2, 0.01))
    # 90 % of a core is left; a trial of 10 epochs takes 0.3 s of it, once in 60 s.
    assert cost.slots(60.0, 10) == pytest.approx(0.9 * 60 / 0.3)
    # A driver that waits for its study is full earlier.
    assert cost.slots(60.0, 10, full=0.7) == pytest.approx(0.6 * 60 / 0.3)


def test_no_part_of_the_cost_is_below_zero() -> None:
    loads = [Load(10.0, 10.0, 10.0, 2.0), Load(10.0, 10.0, 40.0, 1.9), Load(10.0, 20.0, 20.0, 4.0)]
    cost = fit(loads)
    assert min(cost.second, cost.trial, cost.epoch) == 0.0
    assert cost.trial == pytest.approx(0.2, rel=0.05)


def test_runs_that_cannot_tell_the_parts_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="two numbers of epochs"):
        fit([Load(10.0, 5.0, 20.0, 1.0), Load(10.0, 10.0, 40.0, 2.0)])


def test_spreads() -> None:
    assert Spread.range([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.quartiles([1.0]) == Spread(1.0, 1.0, 1.0)
    assert Cost(0.0, 1.0, 0.0).slots(5.0, 3) == 5.0


def test_the_rounds_alternate_and_the_ideal_is_sleep_alone() -> None:
    options = Options(slots=(1, 2), saturating=(4, 16), rounds=2, trials_a_slot=5, sleep=0.25)
    plans = options.plans()
    assert [plan.slots for plan in plans] == [1, 2, 1, 2, 4, 16]
    assert [plan.trials for plan in plans] == [5, 10, 5, 10, 60, 192]
    assert plans[1].ideal == 7200
    assert math.isinf(plans[-1].ideal)
    assert Plan(4, 24, 4, 0.5).ideal == 7200


@pytest.mark.parametrize("slots", ["", "0", "1,two", "1,,2"])
def test_slots_that_are_no_numbers_are_refused(slots: str) -> None:
    done = CliRunner().invoke(app, ["bench", "scaling", "--slots", slots])
    assert done.exit_code != 0
    assert "--slots: expected numbers from 1" in str(done.exception)


def test_runs_too_alike_to_tell_the_costs_apart_are_refused_before_any() -> None:
    words = ["bench", "scaling", "--slots", "4", "--saturating", "4,4", "--rounds", "5"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code != 0
    assert done.stdout == ""
    assert "two kinds of runs" in str(done.exception)


@pytest.mark.cluster_full
@pytest.mark.timeout(600)
def test_it_measures_real_searches_on_real_clusters() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "topotune", "bench", "scaling", "--quick", "--json"],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    one, two, full = report["runs"]
    for run, slots in ((one, 1), (two, 2), (full, 4)):
        assert run["plan"]["slots"] == run["workers"] == slots
        assert run["cpu"]["driver"] > 0
        assert run["cpu"]["ray"] > 0
        assert run["cpu"]["workers"] > 0
        assert run["start"] + run["close"] < run["whole"]
    for run in (one, two):
        assert run["ideal"] == 4500 * run["plan"]["slots"]
        assert 0 < run["efficiency"] < 1  # whoever sleeps cannot be faster than the sleep
        assert run["between_trials"]["median"] > run["between_epochs"]["median"] > 0
    assert report["ceiling"] > 0
    assert min(report["driver_cost"].values()) >= 0
    assert [row["slots"] for row in report["projection"]] == sorted(
        row["slots"] for row in report["projection"]
    )
