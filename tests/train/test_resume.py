"""A trial that is interrupted ends as if it had not been, bit for bit."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train_cases import (
    METHODS,
    STEPS,
    Blobs,
    advance,
    assert_same,
    method_spec,
    reports_of,
    stable,
    state_of,
)
from topotune.errors import (
    CheckpointError,
)
from topotune.records import (
    EpochReport,
    Outcome,
    TrainOptions,
)
from topotune.train.checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE
from topotune.train.trace import TRACE_FILE
from topotune.train.trial import (
    open_trial,
    run_trial,
)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_after_any_epoch_equals_uninterrupted(tmp_path: Path, method: str) -> None:
    spec = method_spec(method)
    whole = run_trial(spec, folder=tmp_path / "whole")
    assert whole.outcome is Outcome.COMPLETE
    assert len(whole.history) == spec.epochs
    for stop in (1, 2, 3):
        folder = tmp_path / f"stopped-{stop}"
        advance(open_trial(spec, folder=folder), stop)
        resumed = run_trial(spec, folder=folder)
        assert reports_of(resumed) == reports_of(whole)
        assert_same(state_of(spec, folder), state_of(spec, tmp_path / "whole"))
        assert (folder / TRACE_FILE).read_bytes() == (tmp_path / "whole" / TRACE_FILE).read_bytes()


def test_resumed_after_every_epoch_in_turn(tmp_path: Path) -> None:
    spec = method_spec("adam")
    whole = run_trial(spec, folder=tmp_path / "whole")
    for stop in (1, 2, 3):
        run = open_trial(spec, folder=tmp_path / "pieces")
        assert run.restored == stop - 1
        advance(run, stop)
    assert_same(state_of(spec, tmp_path / "pieces"), state_of(spec, tmp_path / "whole"))
    assert reports_of(whole) == state_of(spec, tmp_path / "pieces")["history"]


def test_what_the_consumer_draws_between_epochs_has_no_effect() -> None:
    def meddle(report: EpochReport) -> bool:
        random.seed(report.epoch)
        np.random.seed(report.epoch)
        torch.manual_seed(report.epoch)
        return True

    spec = method_spec("adam")
    assert reports_of(run_trial(spec, on_epoch=meddle)) == reports_of(run_trial(spec))


KILLED = """
import sys
import time
from pathlib import Path
from topotune.records import TrialSpec
from topotune.train.trial import run_trial
run_trial(TrialSpec.from_json(sys.argv[1]), folder=Path(sys.argv[2]))
"""


def test_killed_mid_epoch_in_a_fresh_process_then_resumed_in_a_used_one(tmp_path: Path) -> None:
    spec = method_spec("adam")
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, spec.to_json(), str(tmp_path / "killed")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "BLOBS_KILL_AT": str(2 * STEPS + 3)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    # The fifth trial of this process: the others leave their marks on the global state.
    for number in range(4):
        other = method_spec("sgd", seed=number, epochs=1, task_options={"bad_at": number})
        run_trial(other)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.rand(number)
    run = open_trial(spec, folder=tmp_path / "whole")
    advance(run, 2)
    assert_same(state_of(spec, tmp_path / "killed"), state_of(spec, tmp_path / "whole"))

    resumed = run_trial(spec, folder=tmp_path / "killed")
    assert resumed.outcome is Outcome.COMPLETE
    assert reports_of(resumed) == reports_of(run_trial(spec))


def test_a_corrupt_newest_checkpoint_costs_one_epoch_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = method_spec("adam")
    whole = run_trial(spec)
    advance(open_trial(spec, folder=tmp_path), 2)
    content = (tmp_path / CHECKPOINT_FILE).read_bytes()
    (tmp_path / CHECKPOINT_FILE).write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING, logger="topotune"):
        run = open_trial(spec, folder=tmp_path)
    assert run.restored == 1
    assert "damaged" in caplog.text
    assert [stable(report) for report in run.reports()] == reports_of(whole)


def test_two_corrupt_checkpoints_cost_the_trials_time_and_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = method_spec("adam")
    whole = run_trial(spec)
    advance(open_trial(spec, folder=tmp_path), 3)
    for name in (CHECKPOINT_FILE, PREVIOUS_FILE):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, logger="topotune"):
        run = open_trial(spec, folder=tmp_path)
    assert run.restored == 0
    assert "starts from its beginning" in caplog.text
    assert [stable(report) for report in run.reports()] == reports_of(whole)
    assert open_trial(spec, folder=tmp_path).restored == spec.epochs


def test_a_clock_that_is_set_back_stamps_no_epoch_before_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = method_spec("adam")
    advance(open_trial(spec, folder=tmp_path), 1)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 3600 * 10**9)
    stamps = [report.timestamp_ms for report in open_trial(spec, folder=tmp_path).reports()]
    assert len(stamps) == spec.epochs
    assert stamps == [stamps[0]] * spec.epochs


def test_another_trials_folder_is_refused(tmp_path: Path) -> None:
    advance(open_trial(method_spec("adam"), folder=tmp_path), 1)
    with pytest.raises(CheckpointError, match="seed is 7 there and 8 here"):
        open_trial(method_spec("adam", seed=8), folder=tmp_path)


def test_a_checkpoint_of_a_model_that_has_changed_since_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance(open_trial(method_spec("adam"), folder=tmp_path), 1)
    monkeypatch.setattr(Blobs, "model", lambda *_: torch.nn.Linear(4, 3))
    with pytest.raises(CheckpointError, match=r"(?s)does not fit the model.*first\.weight"):
        open_trial(method_spec("adam"), folder=tmp_path)


def test_a_failed_checkpoint_ends_the_run_before_the_epoch_is_reported(tmp_path: Path) -> None:
    run = open_trial(method_spec("adam"), tmp_path)
    reports = run.reports()
    next(reports)
    (tmp_path / (CHECKPOINT_FILE + ".partial")).mkdir()  # the next write must fail, for root too
    with pytest.raises(CheckpointError, match="cannot be written"):
        next(reports)
    assert len(run.history) == 1
    assert [report.epoch for report in run.record.history] == [1]


BUILT_IN: dict[str, dict[str, Any]] = {
    "digits": {"train": TrainOptions(batch_size=128, schedule="cosine")},
    "quadratic": {"task_options": {"steps_per_epoch": 20}, "train": TrainOptions(batch_size=1)},
    "rosenbrock": {"task_options": {"steps_per_epoch": 20}, "train": TrainOptions(batch_size=1)},
}


@pytest.mark.parametrize("task", BUILT_IN)
def test_built_in_tasks_resume_exactly_too(tmp_path: Path, task: str) -> None:
    changes = {"task": task, "epochs": 2, "task_options": {}} | BUILT_IN[task]
    spec = method_spec("topological_adam-uniform", **changes)
    whole = run_trial(spec, folder=tmp_path / "whole")
    advance(open_trial(spec, folder=tmp_path / "stopped"), 1)
    resumed = run_trial(spec, folder=tmp_path / "stopped")
    assert whole.outcome is Outcome.COMPLETE
    assert reports_of(resumed) == reports_of(whole)
    assert_same(state_of(spec, tmp_path / "stopped"), state_of(spec, tmp_path / "whole"))
