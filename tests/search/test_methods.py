"""A training method's own ends in a search: stopped, unstable, and what is left on disk."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.method_cases import Watched
from tests.search_cases import Desk, make_config, report
from tests.train_cases import BLOBS, STEPS
from topotune.cli.boards import print_best
from topotune.config.budget import Limits
from topotune.config.models import SearchConfig
from topotune.errors import CheckpointError, ConfigError, LeaseLostError, UnstableError
from topotune.files import disk_fault, write_atomically
from topotune.records import EpochReport, Outcome, TrialSpec
from topotune.search.doctor.preflight import preflight
from topotune.search.drive.book import Progress, Turn
from topotune.search.drive.recorder import Recorder, leaderboard
from topotune.search.place.folder import SearchFolder
from topotune.search.ray.tune import beginning
from topotune.search.ray.worker import TrialActor, trial_config
from topotune.search.study.store import Handout
from topotune.tracking.entries import Epoch, Series, Start
from topotune.tracking.outbox import OUTBOX_FILE, bodies_of
from topotune.train.methods import METHODS
from topotune.train.trace import RELAXATION_FILE, TRACE_FILE, read_columns


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "watched", Watched)


def search(low: float, high: float, **fixed: float) -> SearchConfig:
    return make_config(
        task=BLOBS,
        method="watched",
        fixed={"lr": 0.05, **fixed},
        space={"gamma": {"type": "float", "low": low, "high": high}},
        budget={"trials": 3, "epochs": 4},
        overhead={"blocks": 0},
        train={"batch_size": 16},
    )


def handed(turn: Handout | Turn) -> Handout:
    assert isinstance(turn, Handout)
    return turn


def actor_of(folder: SearchFolder, handout: Handout) -> TrialActor:
    """A worker as Ray would start it, in this process."""
    actor = TrialActor.__new__(TrialActor)
    actor.setup(trial_config(handout.number, handout.spec, folder.root, Limits(), Path.cwd()))
    return actor


def work(desk: Desk, handout: Handout) -> list[Progress]:
    """Let a worker train a handout to its end, the book taking every step in."""
    actor, seen = actor_of(desk.folder, handout), []
    while True:
        result = actor.step()
        seen.append(Progress.from_json(result["payload"]))
        go_on = desk.book.progress(handout.number, seen[-1])
        assert result["done"] is (seen[-1].outcome is not None)
        if not go_on:
            actor.cleanup()
            return seen


def test_a_trial_that_its_learner_stops_is_pruned_with_the_reason_and_never_rerun(
    tmp_path: Path,
) -> None:
    config = search(0.0, 0.5, stop_after=2)
    desk = Desk(tmp_path, config)
    handout = handed(desk.book.next())
    seen = work(desk, handout)
    assert [len(p.reports) for p in seen] == [1, 1, 0]
    row = desk.book.end(handout.number)
    assert row is not None
    assert (row.state, row.reason) == ("PRUNED", "nothing was learnt in 2 epochs")
    assert (row.epochs, row.values, sorted(row.curve)) == (2, (), [1, 2])
    assert row.metrics["val_accuracy"] == row.curve[2]
    again = Desk(tmp_path, config)
    assert again.rows() == [row]
    assert handed(again.book.next()).number == 1
    assert again.book.view("running").counts["PRUNED"] == 1


def test_a_worker_that_died_between_the_last_epoch_and_the_stop_stops_all_the_same(
    tmp_path: Path,
) -> None:
    config = search(0.0, 0.5, stop_after=2)
    desk = Desk(tmp_path, config)
    handout = handed(desk.book.next())
    first = actor_of(desk.folder, handout)
    for _ in range(2):
        desk.book.progress(handout.number, Progress.from_json(first.step()["payload"]))
    first.cleanup()
    again = Desk(tmp_path, config)
    orphan = handed(again.book.next())
    assert orphan.number == handout.number
    seen = work(again, orphan)
    assert [len(p.reports) for p in seen] == [2, 0]
    row = again.book.end(orphan.number)
    assert row is not None
    assert (row.state, row.reason, row.epochs) == ("PRUNED", "nothing was learnt in 2 epochs", 2)


def test_an_unstable_trial_is_diverged_with_the_cause_and_teaches_the_sampler(
    tmp_path: Path,
) -> None:
    config = search(1.0, 2.0)
    desk = Desk(tmp_path, config)
    handout = handed(desk.book.next())
    (only,) = work(desk, handout)
    assert (only.outcome, only.reports) == (Outcome.DIVERGED, ())
    row = desk.book.end(handout.number)
    assert row is not None
    assert (row.state, row.epochs, row.values) == ("DIVERGED", 0, ())
    assert row.reason.startswith("gamma: must be below 1 (got 1.")
    assert row.reason.endswith("Lower gamma")
    assert handed(Desk(tmp_path, config).book.next()).number == 1
    Recorder(desk.folder, config).progress(row.number, beginning(handout.spec))
    (start,) = bodies_of(desk.folder.root, row.number)
    assert isinstance(start, Start)
    assert float(start.params["gamma"]) == pytest.approx(handout.spec.params["gamma"])


def test_a_worker_reports_all_that_is_recorded_and_its_successor_the_same(tmp_path: Path) -> None:
    config = search(0.0, 0.5)
    desk = Desk(tmp_path, config)
    desk.book.record = Recorder(desk.folder, config).progress
    handout = handed(desk.book.next())
    first = actor_of(desk.folder, handout)
    told = Progress.from_json(first.step()["payload"])
    assert desk.book.progress(handout.number, told)
    lost = Progress.from_json(first.step()["payload"])  # its worker dies before it is reported
    first.cleanup()
    second = actor_of(desk.folder, handout)
    again = Progress.from_json(second.step()["payload"])
    assert again.reports == (*told.reports, *lost.reports)
    assert desk.book.progress(handout.number, again)
    second.cleanup()
    bodies = bodies_of(desk.folder.root, handout.number)
    assert [type(body).__name__ for body in bodies] == [
        *("Start", "Series", "Metrics", "Epoch"),
        *("Series", "Epoch"),
    ]
    series = [body for body in bodies if isinstance(body, Series)]
    assert [body.last for body in series] == [STEPS, 2 * STEPS]
    assert series[1] in lost.entries
    assert [body.report for body in bodies if isinstance(body, Epoch)] == list(again.reports)


def test_several_objectives_take_a_pruned_trial_too(tmp_path: Path) -> None:
    config = make_config(
        objective=[
            {"metric": "val_accuracy", "direction": "maximize"},
            {"metric": "overhead_vs_adam", "direction": "minimize"},
        ],
        sampler="nsga2",
    )
    desk = Desk(tmp_path, config)
    handout = handed(desk.book.next())
    desk.book.progress(handout.number, Progress((report(handout.spec, 1),)))
    desk.book.progress(handout.number, Progress((), {}, Outcome.PRUNED, "unconverged"))
    row = desk.book.end(handout.number)
    assert row is not None
    assert (row.state, row.reason, row.values) == ("PRUNED", "unconverged", ())
    desk.run()
    assert len(desk.rows()) == 6


@pytest.mark.parametrize(("low", "high", "unstable"), [(0.0, 0.5, 0), (0.0, 2.0, 1)])
def test_a_search_with_stable_corners_is_allowed_and_the_others_are_noted(
    low: float, high: float, unstable: int
) -> None:
    notes: list[str] = []
    assert "learner_epochs" in preflight(search(low, high), notes.append)
    assert len(notes) == unstable
    if unstable:
        assert notes[0].startswith("1 of 2 extremes of the space are unstable")
        assert "gamma: must be below 1 (got 2.0)" in notes[0]


def test_an_unstable_middle_does_not_refuse_a_space_that_has_stable_corners() -> None:
    config = search(0.0, 0.5)
    data = config.model_dump()
    data["space"] = {"gamma": {"type": "categorical", "choices": [1.5, 0.5]}}
    notes: list[str] = []
    assert "val_loss" in preflight(SearchConfig.model_validate(data), notes.append)
    assert len(notes) == 1


def test_a_search_without_a_stable_corner_is_refused() -> None:
    with pytest.raises(UnstableError, match=r"gamma: must be below 1 \(got 1\.0\)"):
        preflight(search(1.0, 2.0))


def test_other_mistakes_at_a_corner_are_refused_although_some_are_unstable() -> None:
    config = make_config(space={"lr": {"type": "float", "low": -1.0, "high": 0.1}})
    with pytest.raises(ConfigError, match=r"-1"):
        preflight(config)


def test_the_files_of_a_trial_are_joined_and_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = search(0.0, 0.5)
    desk = Desk(tmp_path, config)
    handout = handed(desk.book.next())
    actor = actor_of(desk.folder, handout)
    for _ in range(2):  # the search stops it then: nobody but the recorder joins its files
        desk.book.progress(handout.number, Progress.from_json(actor.step()["payload"]))
    desk.book.progress(handout.number, Progress((), {}, Outcome.PRUNED, "median after epoch 2"))
    row = desk.book.end(handout.number)
    assert row is not None
    recorder = Recorder(desk.folder, config)
    recorder.start({})
    recorder.ended(row)
    recorder.close(leaderboard(desk.folder, config), "INTERRUPTED", "")
    assert not (desk.folder.root / "history.png").exists()  # a stop waits for no plot
    assert "missing" not in caplog.text
    recorder = Recorder(desk.folder, config)
    recorder.start({})
    recorder.recover([row])
    recorder.close(leaderboard(desk.folder, config), "COMPLETE", "")
    assert (desk.folder.root / "history.png").exists()
    trial = desk.folder.trial(row.number)
    assert read_columns(trial / TRACE_FILE)["batch_rows"].shape == (2 * STEPS,)
    assert read_columns(trial / RELAXATION_FILE)["energy"].shape == (2, 5)
    left = {path.name for path in trial.iterdir()}
    assert not left & {"trace", "relaxation", "trace.used", "relaxation.used"}
    outbox = (desk.folder.root / OUTBOX_FILE).read_text()
    for name in ("trace.npz", "relaxation.npz"):
        assert f"trials/0000/{name}" in outbox
    again = Recorder(desk.folder, config)  # a killed driver's successor finds nothing to do
    again.start({})
    again.recover([row])
    again.close(leaderboard(desk.folder, config), "COMPLETE", "")
    assert np.isfinite(read_columns(trial / RELAXATION_FILE)["epoch"]).all()
    assert json.loads((desk.folder.root / "leaderboard.json").read_text())["counts"]["PRUNED"] == 1


def test_a_leaderboard_shows_what_the_step_was_timed_against(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config(budget={"trials": 1, "epochs": 1}))

    values = {"val_accuracy": 0.5, "overhead_vs_bptt": 0.756, "overhead_vs_bptt_iqr": 0.123}

    def timed(spec: TrialSpec, epoch: int) -> EpochReport:
        return EpochReport(epoch, 1, values, 0.1, 1)

    desk.run(timed)
    board = leaderboard(desk.folder, desk.config)
    cells = {column.title: column.cells for column in board.columns()}
    assert "vs adam" not in cells
    assert cells["vs bptt"] == ("0.76 (0.12)",)
    printed = io.StringIO()
    print_best(Console(file=printed, width=200), board)
    assert "val_accuracy 0.5000, step time 0.76x BPTT (IQR 0.12)\n" in printed.getvalue()


def test_files_left_open_fail_the_trial_and_a_full_disk_stops_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, search(0.0, 0.5))
    actor = actor_of(desk.folder, handed(desk.book.next()))
    actor.step()
    leak = OSError(errno.EMFILE, "Too many open files")
    wrapped = CheckpointError("cannot be written")
    wrapped.__cause__ = leak
    full = errno.ENOSPC, "No space left on device"
    cases: list[tuple[Exception, bool]] = [
        (leak, False),
        (wrapped, False),
        (OSError(*full), False),
        (OSError(*full, "/dev/full"), False),
        (OSError(*full, str(desk.folder.trial(0) / "checkpoint.pt")), True),
        (CheckpointError("cannot be written"), True),
    ]
    for error, stops in cases:

        def fails(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(actor, "_next", fails)
        progress = actor._advance()
        assert bool(progress.stop) is stops
        assert (progress.outcome is Outcome.FAILED) is not stops
        assert str(error) in (progress.stop or progress.reason)
    actor.cleanup()


class MuteError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("file \udcff"), "ValueError: file \\udcff"),
        (MuteError(), "MuteError: (its text raises ValueError)"),
        (OSError("https://me:s3cretpw@host " + "x" * 600), "OSError: https://***@host xxx"),
    ],
    ids=["surrogate", "mute", "secret"],
)
def test_any_exception_of_a_trial_is_put_into_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def fails() -> Progress:
        raise error

    desk = Desk(tmp_path, make_config())
    actor = actor_of(desk.folder, handed(desk.book.next()))
    monkeypatch.setattr(actor, "_next", fails)
    progress = Progress.from_json(actor.step()["payload"])
    assert progress.outcome is Outcome.FAILED
    assert progress.reason.startswith(text)
    assert (desk.folder.trial(0) / "error.txt").read_text().startswith("Traceback")
    actor.cleanup()


def test_a_write_that_is_fenced_off_leaves_all_as_it_was(tmp_path: Path) -> None:
    def lost() -> None:
        raise LeaseLostError("another driver")

    path = tmp_path / "live.json"
    path.write_text("theirs")
    with pytest.raises(LeaseLostError):
        write_atomically(path, b"ours", tmp_path / "previous", lost)
    assert [p.name for p in tmp_path.iterdir()] == ["live.json"]
    assert path.read_text() == "theirs"


def test_a_write_to_a_full_disk_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_atomically(tmp_path / "trace.npz", b"x")
    assert disk_fault(caught.value, tmp_path)
    assert not disk_fault(caught.value, tmp_path / "search")
    assert list(tmp_path.iterdir()) == []  # a whole checkpoint would keep the disk full
