"""Decisions without Ray: pruning, budgets, stopping, ends; the ledger; the folder and its lease."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.search_cases import Desk, accuracy, make_config, report, study_files
from topotune.errors import ConfigError, ResourceError, RunError, SearchFolderError
from topotune.records import EpochReport, Outcome, TrialSpec
from topotune.search.doctor.preflight import check_writable
from topotune.search.drive.book import Progress, Turn
from topotune.search.drive.retention import Retention
from topotune.search.driver import extended
from topotune.search.place.folder import SearchFolder, searches
from topotune.search.place.lease import FileLease, lease_holder
from topotune.search.ray.tune import StudySearcher
from topotune.search.status import status
from topotune.search.study.ledger import MAX_GAP, Ledger
from topotune.search.study.rows import Spent
from topotune.search.study.store import Handout, StudyStore
from topotune.search.view import SafeListener
from topotune.train.checkpoint import CHECKPOINT_FILE


def handed(turn: Handout | Turn) -> Handout:
    assert isinstance(turn, Handout)
    return turn


def test_asha_stops_the_worse_at_its_rungs_and_keeps_the_best(tmp_path: Path) -> None:
    config = make_config(
        budget={"trials": 20, "epochs": 9}, pruner={"name": "asha", "reduction_factor": 3}
    )
    desk = Desk(tmp_path, config)
    desk.run()
    rows = desk.rows()
    pruned = [row for row in rows if row.state == "PRUNED"]
    complete = [row for row in rows if row.state == "COMPLETE"]
    assert len(pruned) >= 8
    assert {row.epochs for row in pruned} <= {1, 3}
    assert all(row.reason.startswith("asha after epoch") for row in pruned)
    assert all(max(row.curve) == row.epochs for row in pruned)
    best_first = max(row.curve[1] for row in rows)
    assert best_first in {row.curve[1] for row in complete}


def test_pruning_decisions_survive_a_restart(tmp_path: Path) -> None:
    config = make_config(budget={"trials": 12, "epochs": 9}, pruner="asha")
    whole = Desk(tmp_path / "whole", config)
    whole.run()
    for _ in range(12):
        desk = Desk(tmp_path / "pieces", config)
        desk.train(handed(desk.book.next()))
    states = [(row.state, row.epochs, row.params) for row in desk.rows()]
    assert states == [(row.state, row.epochs, row.params) for row in whole.rows()]


def test_concurrency_is_a_limit_and_a_stop_leaves_trials_to_a_resume(tmp_path: Path) -> None:
    config = make_config()
    desk = Desk(tmp_path, config, concurrency=2)
    first, second = handed(desk.book.next()), handed(desk.book.next())
    assert desk.book.next() is Turn.WAIT
    desk.book.stop("stopped by SIGINT")
    assert desk.book.next() is Turn.END
    assert not desk.book.progress(first.number, Progress((report(first.spec, 1),)))
    assert desk.book.end(first.number) is None
    assert desk.book.end(second.number) is None
    assert [row.state for row in desk.rows()] == ["RUNNING", "RUNNING"]
    again = Desk(tmp_path, config, concurrency=2)
    assert {handed(again.book.next()).number, handed(again.book.next()).number} == {0, 1}


def test_a_trial_that_finishes_while_stopping_counts(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config(budget={"trials": 3, "epochs": 1}))
    handout = handed(desk.book.next())
    desk.book.stop("stopped by SIGTERM")
    done = Progress((report(handout.spec, 1),), outcome=Outcome.COMPLETE)
    assert not desk.book.progress(handout.number, done)
    row = desk.book.end(handout.number)
    assert row is not None
    assert row.state == "COMPLETE"


def test_a_dead_worker_is_failed_with_its_cause(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    handout = handed(desk.book.next())
    desk.book.progress(handout.number, Progress((report(handout.spec, 1),)))
    row = desk.book.end(handout.number, "its worker died 3 times")
    assert row is not None
    assert (row.state, row.reason, row.epochs) == ("FAILED", "its worker died 3 times", 1)
    assert desk.book.end(handout.number) is None  # a second notice changes nothing
    assert desk.book.view("running").counts["FAILED"] == 1


def test_a_metric_that_no_trial_reports_ends_the_search_with_the_names(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config(objective={"metric": "val_acuracy", "direction": "maximize"}))
    handout = handed(desk.book.next())
    assert not desk.book.progress(handout.number, Progress((report(handout.spec, 1),)))
    assert isinstance(desk.book.fatal, ConfigError)
    assert "did you mean 'val_accuracy'?" in str(desk.book.fatal)
    row = desk.book.end(handout.number)
    assert row is not None
    assert row.state == "FAILED"
    assert desk.book.next() is Turn.END


@pytest.mark.parametrize("limit", ["wall_clock", "device_seconds"])
def test_a_limit_of_time_ends_the_search_and_its_trials(limit: str, tmp_path: Path) -> None:
    config = make_config(budget={"epochs": 4, limit: 5.0})
    desk = Desk(tmp_path, config, concurrency=2)
    handout = handed(desk.book.next())
    assert desk.book.progress(handout.number, Progress((report(handout.spec, 1),)))
    desk.ledger.wall_seconds = 6.0
    desk.ledger.trials[handout.number] = desk.ledger.device_seconds = 6.0
    assert desk.book.next() is Turn.END
    assert not desk.book.progress(handout.number, Progress((report(handout.spec, 2),)))
    row = desk.book.end(handout.number)
    assert row is not None
    assert row.state == "PRUNED"
    assert f"budget.{limit}" in row.reason
    assert row.device_seconds == 6.0


def test_a_spent_budget_closes_what_an_earlier_session_left_running(tmp_path: Path) -> None:
    config = make_config(budget={"epochs": 4, "wall_clock": 5.0})
    first = Desk(tmp_path, config)
    handout = handed(first.book.next())
    first.book.progress(handout.number, Progress((report(handout.spec, 1),)))
    again = Desk(tmp_path, config)
    again.ledger.wall_seconds = 6.0
    assert again.book.next() is Turn.END
    (row,) = again.rows()
    assert row.state == "PRUNED"
    assert row.epochs == 1
    assert "budget.wall_clock" in row.reason
    assert [ended.number for ended in again.ended] == [0]


def test_an_end_that_cannot_be_stored_stops_the_search_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(budget={"trials": 2, "epochs": 1})
    desk = Desk(tmp_path, config)
    handout = handed(desk.book.next())
    searcher = StudySearcher(desk.book, lambda handout: {})
    searcher._numbers["t"] = handout.number
    done = Progress((report(handout.spec, 1),), outcome=Outcome.COMPLETE)

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(desk.store._study, "tell", broken)
        searcher.on_trial_complete("t", {"payload": done.to_json()})
    assert isinstance(desk.book.fatal, RunError)
    assert "disk I/O error" in str(desk.book.fatal)
    assert desk.book.next() is Turn.END
    again = Desk(tmp_path, config)  # its end was noted: the next driver finishes it
    again.run()
    assert [row.state for row in again.rows()] == ["COMPLETE", "COMPLETE"]


def test_a_machine_that_fails_stops_the_search_and_keeps_the_trial(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    handout = handed(desk.book.next())
    assert not desk.book.progress(handout.number, Progress(stop="no space left on device"))
    assert desk.book.end(handout.number) is None
    assert "no space left" in str(desk.book.fatal)
    assert [row.state for row in desk.rows()] == ["RUNNING"]


def test_a_listener_that_is_gone_does_not_end_a_search() -> None:
    class Gone:
        calls = 0

        def note(self, text: str) -> None:
            self.calls += 1
            raise BrokenPipeError

        tick = ended = note

    gone = Gone()
    safe = SafeListener(gone)  # type: ignore[arg-type]
    safe.note("a")
    safe.note("b")
    assert gone.calls == 1


def test_a_replayed_epoch_is_not_judged_anew(tmp_path: Path) -> None:
    config = make_config(budget={"trials": 9, "epochs": 4}, pruner="median")
    desk = Desk(tmp_path, config)
    handout = handed(desk.book.next())
    bad = tuple(report(handout.spec, epoch, val_accuracy=0.01) for epoch in (1, 2, 3))
    for one in bad:
        assert desk.book.progress(handout.number, Progress((one,)))
    for _ in range(6):  # better ones finish meanwhile, as with concurrency 2
        desk.book.concurrency = 2
        desk.train(handed(desk.book.next()))
    again = Desk(tmp_path, config)
    orphan = handed(again.book.next())
    again.book.progress(orphan.number, Progress(bad))
    row = again.book.end(orphan.number, "")
    assert row is not None
    assert row.epochs == 3


def test_infinite_metrics_are_diverged_and_the_view_counts(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config(budget={"trials": 2, "epochs": 2}))

    def explode(spec: TrialSpec, epoch: int) -> EpochReport:
        return report(spec, epoch, **({"val_accuracy": float("inf")} if epoch == 2 else {}))

    desk.run(explode)
    view = desk.book.view("done")
    assert view.counts["DIVERGED"] == 2
    assert view.front == ()
    assert all(row.curve == {1: accuracy(TrialSpec.from_dict(row.spec), 1)} for row in desk.rows())


def test_progress_survives_json() -> None:
    spec = TrialSpec("digits", "adam", 2, 0, params={"lr": 0.1})
    progress = Progress(
        (report(spec, 1, energy=float("inf")),), {"x": float("nan")}, Outcome.DIVERGED, "why"
    )
    back = Progress.from_json(progress.to_json())
    assert back.reports == progress.reports
    assert back.outcome is Outcome.DIVERGED
    assert back.metrics["x"] != back.metrics["x"]


def test_the_ledger_charges_each_holder_and_survives_a_kill(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config(), concurrency=2)
    for _ in range(2):
        handed(desk.book.next())
    ledger = Ledger(desk.store.spent(), desk.store.keep_spent, devices=0.5)
    ledger.tick([])
    time.sleep(0.05)
    ledger.tick([0, 1])
    ledger.save()
    assert 0.02 < ledger.trials[0] == ledger.trials[1] < 1
    store = StudyStore(desk.folder, desk.config)  # the driver was killed
    again = Ledger(store.spent(), store.keep_spent, devices=0.5)
    assert again.device_seconds == pytest.approx(ledger.device_seconds, abs=2e-3)
    assert again.wall_seconds == pytest.approx(ledger.wall_seconds, abs=2e-3)
    again._last -= 10 * MAX_GAP  # the machine slept
    before = again.wall_seconds
    again.tick([1])
    assert again.wall_seconds - before == pytest.approx(MAX_GAP)


def test_the_ledger_is_kept_about_once_a_second_and_fills_no_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    desk = Desk(tmp_path, make_config(budget={"trials": 50, "epochs": 1}))
    first = handed(desk.book.next())
    for _ in range(40):  # a second trial after another beside a long one
        desk.book.concurrency = 2
        other = handed(desk.book.next())
        desk.book.holding.update({first.number, other.number})
        clock[0] += 1.0
        desk.ledger.tick(desk.book.holding)
        desk.train(other)
        assert StudyStore(desk.folder, desk.config).spent() == Spent(
            desk.ledger.wall_seconds, desk.ledger.trials
        )
    assert desk.ledger.wall_seconds == 40.0
    notes = [
        line for line in study_files(desk.folder)[0].read_bytes().splitlines() if b"spent" in line
    ]
    assert len(notes) == 40
    assert max(map(len, notes)) < 300  # trials that have ended are not among them
    written: list[Spent] = []
    long = Ledger(Spent(0.0, {}), written.append)
    for _ in range(240 * 3600):
        clock[0] += 1.0
        long.tick([0])
    assert 36_000 < len(written) < 36_000 * (1 + math.log(24))  # of ten days


def test_folders_are_whole_named_and_not_shared(tmp_path: Path) -> None:
    config = make_config()
    folder = SearchFolder.create(tmp_path, config, "name: demo\n")
    assert folder.config() == config
    assert [found.name for found in searches(tmp_path)] == ["demo"]
    with pytest.raises(SearchFolderError, match=r"this search already.*resume demo"):
        SearchFolder.create(tmp_path, config, "")
    with pytest.raises(SearchFolderError, match="another search"):
        SearchFolder.create(tmp_path, make_config(seed=9), "")
    with pytest.raises(SearchFolderError, match=r"no search named 'demi' \(there: demo\)"):
        SearchFolder.open(tmp_path, "demi")
    for name in ("../demo", "/etc", "", "."):
        with pytest.raises(SearchFolderError):
            SearchFolder.open(tmp_path, name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(SearchFolderError, match="not empty"):
        SearchFolder.create(tmp_path, make_config(name="other"), "")
    folder.meta.write_text("{")
    with pytest.raises(SearchFolderError, match="damaged"):
        SearchFolder.open(tmp_path, "demo")


def test_the_lease_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "driver.lock"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from topotune.search.place.lease import FileLease\n"
        "with FileLease(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(SearchFolderError, match=f"pid {other.pid} on"), FileLease(path):
                pass
            assert lease_holder(path) == f"pid {other.pid} on {os.uname().nodename}"
        finally:
            other.kill()
    assert lease_holder(path) is None
    with FileLease(path):
        assert str(os.getpid()) in (lease_holder(path) or "")
    assert lease_holder(path) is None


def test_a_results_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ResourceError, match="is a file"):
        check_writable(tmp_path / "file" / "deep")


def test_a_file_system_without_locks_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:  # as NFS answers without its lock service
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(ResourceError, match=r"locks no files \(No locks available\).*Mount it"):
        check_writable(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_only_the_best_checkpoints_stay(tmp_path: Path) -> None:
    config = make_config(keep_checkpoints=2, budget={"trials": 8, "epochs": 2})
    desk = Desk(tmp_path, config)
    desk.run()
    rows = desk.rows()
    for row in rows:
        desk.folder.trial(row.number).mkdir()
        (desk.folder.trial(row.number) / CHECKPOINT_FILE).touch()
    Retention(desk.folder, config, rows)
    kept = {
        row.number for row in rows if (desk.folder.trial(row.number) / CHECKPOINT_FILE).exists()
    }
    best = sorted(rows, key=lambda row: -row.values[0])[:2]
    assert kept == {row.number for row in best}


def test_extending_scales_every_limit() -> None:
    config = make_config(budget={"trials": 10, "epochs": 2, "device_seconds": 100.0})
    budget = extended(config, 5).budget
    assert (budget.trials, budget.device_seconds, budget.wall_clock) == (15, 150.0, None)
    with pytest.raises(ConfigError, match="no limit of trials"):
        extended(make_config(budget={"wall_clock": 10.0}), 5)
    with pytest.raises(ConfigError, match="all 2 points of the grid"):
        extended(make_config(sampler="grid", space={"d": {"type": "int", "low": 1, "high": 2}}), 5)


GRID: dict[str, Any] = {
    "sampler": "grid",
    "space": {
        "lr": {"type": "categorical", "choices": [0.001, 0.01, 0.1]},
        "model.hidden": {"type": "int", "low": 8, "high": 24, "step": 8},
    },
}


def test_a_grid_with_fewer_trials_than_points_is_extended_up_to_them(tmp_path: Path) -> None:
    config = make_config(budget={"trials": 4, "epochs": 1, "wall_clock": 100.0}, **GRID)
    desk = Desk(tmp_path, config)
    desk.run()
    assert (len(desk.rows()), desk.book.short_of_trials()) == (4, "")
    six = extended(config, 2)
    assert (six.budget.trials, six.budget.wall_clock) == (6, 150.0)
    nine = extended(config, 20)
    assert nine.budget.trials == 9
    desk.folder.save(nine)
    desk = Desk(tmp_path, nine)
    desk.run()
    points = {(row.params["lr"], row.params["model.hidden"]) for row in desk.rows()}
    assert (len(desk.rows()), len(points)) == (9, 9)
    with pytest.raises(ConfigError, match=r"all 9 points .* Give a parameter more choices"):
        extended(nine, 1)


def test_a_search_says_why_it_ends_before_its_budget_of_trials(tmp_path: Path) -> None:
    grid = Desk(tmp_path, make_config(budget={"trials": 10, "epochs": 1}, **GRID))
    assert grid.book.view("running").total == 9
    assert grid.book.short_of_trials() == ""
    grid.run()
    assert grid.book.short_of_trials() == "all 9 points of the grid have been tried"
    timed = Desk(tmp_path / "t", make_config(budget={"trials": 10, "wall_clock": 5.0}))
    timed.ledger.wall_seconds = 6.0
    timed.run()
    assert timed.book.short_of_trials() == "budget.wall_clock of 5 s is used up"


def test_a_grid_that_was_killed_before_its_first_trial_is_not_finished(tmp_path: Path) -> None:
    SearchFolder.create(tmp_path, make_config(**GRID), "")
    assert status(tmp_path, "demo").state == "stopped"
    desk = Desk(tmp_path, make_config(**GRID))
    desk.run()
    assert status(tmp_path, "demo").state == "finished"


def test_the_identity_file_is_plain_json(tmp_path: Path) -> None:
    folder = SearchFolder.create(tmp_path, make_config(), "x")
    data = json.loads(folder.meta.read_text())
    assert len(data["search_id"]) == 32
    folder.save(make_config(seed=4))
    assert folder.config().seed == 4
    assert folder.search_id == data["search_id"]
