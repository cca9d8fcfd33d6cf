"""A driver that is killed between any two of its durable writes: the search that goes on is the
undisturbed one."""

from __future__ import annotations

import errno
import math
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import JournalStorage

from tests.postgres import Postgres, installed
from tests.search_cases import Desk, accuracy, make_config
from topotune import files
from topotune.config.models import SearchConfig
from topotune.errors import TopotuneError
from topotune.records import EpochReport, Outcome, TrialSpec, TrialSummary
from topotune.search.drive import recorder as recorder_module
from topotune.search.drive.book import Progress, Turn
from topotune.search.drive.recorder import Recorder
from topotune.search.place.addresses import remembered
from topotune.search.place.folder import STUDY_COPY, STUDY_FILE, SearchFolder
from topotune.search.study.database import PatientStorage
from topotune.search.study.rows import summaries
from topotune.search.study.store import Handout
from topotune.seeding import derive_seed
from topotune.tracking.entries import End, Epoch, Metrics, begun
from topotune.tracking.outbox import OUTBOX_FILE, read_all

PRUNERS: dict[str, Any] = {
    "asha": {"name": "asha", "reduction_factor": 2},
    "hyperband": {"name": "hyperband", "reduction_factor": 2},
    "median": {"name": "median", "startup_trials": 2},
    "none": "none",
}
SAMPLERS = ("tpe", "random", "cmaes", "nsga2", "qmc", "grid", "gp")
COST = {"overhead_vs_adam": 1.1}
_WRITES = (
    "create_new_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "create_new_trial",
    "set_trial_param",
    "set_trial_state_values",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
)


Before = Callable[[Path | None, bytes], None]
"""Gets the file and what is to be written; None and nothing of a database."""


@contextmanager
def seam(before: Before) -> Iterator[None]:
    """Call ``before`` ahead of every durable write of a driver: the study's and the files'."""
    put = files.put

    def watch_put(handle: int, content: bytes, force: bool = True) -> None:
        before(Path(f"/proc/self/fd/{handle}").readlink(), content)
        put(handle, content, force)

    def watched(write: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any, **kwargs: Any) -> Any:
            before(None, b"")
            return write(*args, **kwargs)

        return watch

    with pytest.MonkeyPatch.context() as patch:
        for name in _WRITES:
            patch.setattr(PatientStorage, name, watched(getattr(PatientStorage, name)))
        patch.setattr(files, "put", watch_put)
        yield


def torn(path: Path | None, content: bytes) -> Iterator[bytes]:
    """What of a write may be there after a kill: nothing, and of a turn of the study's, or of what
    is recorded at once, any number of its records, the next one half."""
    yield b""
    lines = content.splitlines(keepends=True)
    if path is not None and path.name in (STUDY_FILE, OUTBOX_FILE):
        for count in range(len(lines)):
            yield b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2]


def images_of(results: Path, left: list[Path]) -> Before:
    """Keeps what a kill would leave of a results folder at each write."""
    images = results.with_name(results.name + ".images")

    def photograph(path: Path | None, content: bytes) -> None:
        for part in torn(path, content):
            image = images / f"{len(left)}"
            shutil.copytree(results, image)
            if part and path is not None:
                with (image / path.relative_to(results)).open("ab") as file:
                    file.write(part)
            left.append(image)

    return photograph


def chance(*numbers: int) -> float:
    """A number from 0 to 1 that follows from the arguments."""
    seed = 0
    for number in numbers:
        seed = derive_seed(seed, number)
    return seed / 2**63


def accuracy_of(spec: TrialSpec, number: int, epoch: int) -> float:
    """A curve with ups and downs that depends on the parameters; trial 4 diverges."""
    if number == 4:
        return math.nan
    return accuracy(spec, epoch) + 0.3 * chance(number, epoch, 1)


class Site:
    """The machines that train, whatever becomes of the driver.

    Attributes:
        trained: the epochs that each trial's checkpoint holds, by its number.
    """

    def __init__(self, trained: dict[int, int] | None = None) -> None:
        self.trained = dict(trained or {})

    def reports(self, spec: TrialSpec, number: int, first: int = 1) -> tuple[EpochReport, ...]:
        epochs = range(first, self.trained.get(number, 0) + 1)
        return tuple(
            EpochReport(e, 10 * e, {"val_accuracy": accuracy_of(spec, number, e)}, 0.1, 10**12 + e)
            for e in epochs
        )

    def drive(self, desk: Desk) -> None:
        """Work for a driver until it hands nothing out any more; of the trials in flight, the one
        whose next epoch happens to be the shortest has it done first."""
        specs = {number: TrialSpec.from_dict(spec) for number, spec in _specs(desk).items()}
        desk.book.take_over(lambda n: Progress(self.reports(specs[n], n), COST))
        live: dict[int, Handout] = {}
        while True:
            while isinstance(turn := desk.book.next(), Handout):
                live[turn.number] = turn
                if self.trained.get(turn.number):  # a worker that starts again gives all again
                    replay = Progress(self.reports(turn.spec, turn.number), COST)
                    assert desk.book.progress(turn.number, replay)
            if not live:
                assert turn is Turn.END
                return
            number = min(live, key=lambda n: chance(n, self.trained.get(n, 0), 2))
            epoch = self.trained[number] = self.trained.get(number, 0) + 1
            spec = live[number].spec
            outcome = Outcome.COMPLETE if epoch == spec.epochs else None
            progress = Progress(self.reports(spec, number, epoch), COST, outcome)
            if not desk.book.progress(number, progress):
                desk.book.end(number)
                del live[number]


def _specs(desk: Desk) -> dict[int, dict[str, Any]]:
    return {row.number: dict(row.spec) for row in desk.rows() if row.spec}


def found(rows: list[TrialSummary]) -> list[tuple[object, ...]]:
    """All that must not depend on where a driver was killed."""
    return [
        (r.number, r.state, r.epochs, r.reason, r.params, r.spec, r.values, r.curve, r.metrics)
        for r in rows
    ]


def search(pruner: str, sampler: str, trials: int = 9, epochs: int = 4) -> SearchConfig:
    changes: dict[str, Any] = {}
    space: dict[str, Any] = {
        "lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
        "momentum": {"type": "float", "low": 0.0, "high": 0.9, "step": 0.1},
    }
    if sampler == "grid":
        space["lr"] = {"type": "categorical", "choices": [1e-4, 1e-2, 1e-1]}
    else:
        changes["warm_start"] = [{"lr": 1e-2}]
    if sampler in ("tpe", "gp", "nsga2"):  # the others take no constraints
        changes["constraints"] = {"overhead_vs_adam": {"max": 1.5}}
    return make_config(
        pruner=PRUNERS[pruner],
        sampler={"name": sampler, "startup_trials": 3},
        space=space,
        budget={"trials": trials, "epochs": epochs},
        **changes,
    )


def undisturbed(
    config: SearchConfig, concurrency: int, results: Path
) -> tuple[list[tuple[object, ...]], list[tuple[Path, dict[int, int]]]]:
    """A whole search, and what a kill -9 would have left before each of its durable writes: the
    results folder, and the epochs in the checkpoints."""
    site = Site()
    left: list[tuple[Path, dict[int, int]]] = []
    images: list[Path] = []
    keep = images_of(results, images)

    def photograph(path: Path | None, content: bytes) -> None:
        keep(path, content)
        left.extend((image, dict(site.trained)) for image in images[len(left) :])

    results.mkdir()
    with seam(photograph):
        desk = Desk(results, config, concurrency)
        site.drive(desk)
    rows = found(desk.rows())
    desk.store.close()
    return rows, left


class Killed(BaseException):
    """The driver is gone: nothing of it catches this."""


def killed(site: Site, config: SearchConfig, concurrency: int, results: Path, at: int) -> int:
    """Drive a search until just before the durable write of this number; the writes before it."""
    writes = 0
    opened: list[PatientStorage] = []
    whole = PatientStorage.__init__

    def begun(self: PatientStorage, *args: Any) -> None:
        whole(self, *args)
        opened.append(self)

    def count(*_: object) -> None:
        nonlocal writes
        if writes == at:
            raise Killed
        writes += 1

    with seam(count), pytest.MonkeyPatch.context() as patch:
        patch.setattr(PatientStorage, "__init__", begun)
        with suppress(Killed):
            site.drive(Desk(results, config, concurrency))
    for storage in opened:
        storage.close()
    return writes


def check_every_kill(
    pruner: str, sampler: str, concurrency: int, tmp_path: Path, every: int = 1
) -> None:
    """Every other one is killed once more, a few writes after it was opened again."""
    config = search(pruner, sampler)
    expected, left = undisturbed(config, concurrency, tmp_path / "whole")
    assert len(expected) == 9
    assert len(left) > 8 * len(expected)
    states = {row[1] for row in expected}
    assert states == {"COMPLETE", "DIVERGED"} | ({"PRUNED"} if pruner != "none" else set())
    wrong = []
    for index, (image, trained) in list(enumerate(left))[::every]:
        site = Site(trained)
        if index % 2:
            killed(site, config, concurrency, image, index % 7)
        desk = Desk(image, config, concurrency)
        site.drive(desk)
        if found(desk.rows()) != expected:
            wrong.append(index)
        desk.store.close()
        shutil.rmtree(image)
    assert not wrong


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_kill_before_any_write_changes_nothing(
    pruner: str, sampler: str, concurrency: int, tmp_path: Path
) -> None:
    check_every_kill(pruner, sampler, concurrency, tmp_path)


@pytest.mark.parametrize(
    ("pruner", "sampler", "concurrency", "every"),
    [
        ("asha", "tpe", 3, 7),
        ("asha", "random", 1, 11),
        ("hyperband", "tpe", 3, 17),
        ("median", "qmc", 3, 17),
        ("none", "cmaes", 3, 19),
    ],
)
def test_a_kill_changes_nothing(
    pruner: str, sampler: str, concurrency: int, every: int, tmp_path: Path
) -> None:
    check_every_kill(pruner, sampler, concurrency, tmp_path, every)


class RecordingDesk(Desk):
    """A driver that records for MLflow, too."""

    def __init__(self, results: Path, config: SearchConfig, concurrency: int = 1) -> None:
        super().__init__(results, config, concurrency)
        recorder = Recorder(self.folder, config)
        recorder.recover(self.rows())
        self.book.record = recorder.progress
        self.book._ended = recorder.ended


def recorded(folder: SearchFolder) -> dict[int, list[object]]:
    """What is recorded of each trial that must not depend on where a driver was killed."""
    trials: dict[int, list[object]] = {}
    for _, entry in read_all(folder.root):
        if entry.trial is not None:
            kept = trials.setdefault(entry.trial, [])
            match entry.body:
                case Epoch(report):
                    kept.append(report)
                case End(outcome, reason):
                    kept.append((outcome, reason))
                case other:
                    kept.append(type(other))
    return trials


@pytest.mark.parametrize(("pruner", "concurrency"), [("asha", 3), ("none", 1)])
def test_a_kill_leaves_no_record_twice_and_none_out(
    pruner: str, concurrency: int, tmp_path: Path
) -> None:
    """Before each write of the study and of the outbox, and in the midst of one."""
    config = search(pruner, "random")
    whole, site, images = tmp_path / "whole", Site(), list[Path]()
    trained: list[dict[int, int]] = []
    keep = images_of(whole, images)

    def photograph(path: Path | None, content: bytes) -> None:
        keep(path, content)
        trained.extend(dict(site.trained) for _ in images[len(trained) :])

    whole.mkdir()
    with seam(photograph):
        desk = RecordingDesk(whole, config, concurrency)
        site.drive(desk)
    rows, expected = found(desk.rows()), recorded(desk.folder)
    desk.store.close()
    assert sum(isinstance(one, EpochReport) for one in expected[0]) == rows[0][2]
    for index in range(0, len(images), 13):
        again = RecordingDesk(images[index], config, concurrency)
        Site(trained[index]).drive(again)
        assert found(again.rows()) == rows, index
        assert recorded(again.folder) == expected, index
        again.store.close()


def handed(turn: Handout | Turn) -> Handout:
    assert isinstance(turn, Handout)
    return turn


def pruned_at_its_first_report(desk: Desk) -> tuple[Handout, Progress]:
    """A handout, after a better one has come to the first rung, and the report that stops it."""
    good, bad = handed(desk.book.next()), handed(desk.book.next())
    better = EpochReport(1, 10, {"val_accuracy": 0.9}, 0.1, 10**12)
    assert desk.book.progress(good.number, Progress((better,), COST))
    worse = EpochReport(1, 10, {"val_accuracy": 0.1}, 0.1, 10**12)
    return bad, Progress((worse,), COST)


def test_a_verdict_is_not_lost_between_it_and_the_note_of_the_end(tmp_path: Path) -> None:
    config = search("asha", "random")
    desk = Desk(tmp_path, config, 2)
    bad, progress = pruned_at_its_first_report(desk)
    assert not desk.book.progress(bad.number, progress)
    desk.store.close()  # killed: end() is never called
    again = Desk(tmp_path, config, 2)
    row = again.rows()[bad.number]
    assert (row.state, row.epochs, row.curve) == ("PRUNED", 1, {1: 0.1})
    assert row.reason == "asha after epoch 1 of 4"
    assert row.metrics == {"val_accuracy": 0.1, **COST}
    assert handed(again.book.next()).number == 0
    assert handed(again.book.next()).number == 2
    again.store.close()


def test_a_report_is_one_write_with_its_verdict_and_reads_no_other_trial(tmp_path: Path) -> None:
    desk = Desk(tmp_path, search("asha", "random"), 2)
    bad, progress = pruned_at_its_first_report(desk)
    writes: list[tuple[str, int]] = []

    def note(path: Path | None, content: bytes) -> None:
        assert path is not None
        writes.append((path.name, len(content.splitlines())))

    with seam(note), pytest.MonkeyPatch.context() as patch:
        patch.delattr(JournalStorage, "get_all_trials")
        better = EpochReport(2, 20, {"val_accuracy": 0.95}, 0.1, 10**12)
        assert desk.book.progress(0, Progress((better,), COST))
        assert writes == [(STUDY_COPY, 1), (STUDY_FILE, 1)]
        assert not desk.book.progress(bad.number, progress)
        desk.store.commit()
        # One turn: the verdict with the report's value, then the curve.
        assert writes[2:] == [(STUDY_COPY, 2), (STUDY_FILE, 2)]
    desk.store.close()


def test_what_workers_had_recorded_is_judged_by_trial_number(tmp_path: Path) -> None:
    config = search("asha", "random")
    desk = Desk(tmp_path, config, 3)
    for _ in range(3):
        desk.book.next()
    desk.store.close()
    again = Desk(tmp_path, config, 3)
    values = [0.1, 0.5, 0.3]
    reports = [(EpochReport(1, 10, {"val_accuracy": v}, 0.1, 10**12),) for v in values]
    asked: list[int] = []

    def recorded(number: int) -> Progress:
        asked.append(number)
        return Progress(reports[number], COST)

    again.book.take_over(recorded)
    assert asked == [0, 1, 2]
    # The first is alone at the rung, the second the best of two, the third not the best of three.
    assert [row.state for row in again.rows()] == ["RUNNING", "RUNNING", "PRUNED"]
    assert [row.number for row in again.ended] == [2]
    assert again.ended[0].metrics == {"val_accuracy": 0.3, **COST}
    assert [handed(again.book.next()).number for _ in range(3)] == [0, 1, 3]
    again.store.close()


def test_the_first_child_of_a_generation_is_the_same_after_a_kill(tmp_path: Path) -> None:
    """NSGA-II keeps its parents in the study in the midst of sampling the first child."""
    config = search("none", "nsga2", trials=53, epochs=1)
    site = Site()
    desk = Desk(tmp_path / "whole", config)
    images: list[Path] = []
    while len(desk.ended) < 50:  # the size of a generation
        turn = handed(desk.book.next())
        site.trained[turn.number] = 1
        report = site.reports(turn.spec, turn.number)
        desk.book.progress(turn.number, Progress(report, COST, Outcome.COMPLETE))
        desk.book.end(turn.number)
    with seam(images_of(tmp_path / "whole", images)):
        expected = handed(desk.book.next())
    child = desk.store._frozen(expected.number)
    assert child.system_attrs["NSGAIISampler:generation"] == 1  # as Optuna's own class names it
    desk.store.close()
    assert len(images) > 5
    for image in images:
        again = Desk(image, config)
        assert handed(again.book.next()) == expected
        again.store.close()


def test_a_study_of_a_driver_that_kept_rungs_opens_and_goes_on(tmp_path: Path) -> None:
    config = search("asha", "random")
    desk = Desk(tmp_path, config, 2)
    for _ in range(2):
        desk.book.next()
    # As a driver wrote it that used Optuna's pruner, killed before it had noted the verdict.
    for number, value in ((0, 0.9), (1, 0.1)):
        trial = desk.store._trial(number)
        trial.report(value, 1)
        desk.store._storage.set_trial_system_attr(trial._trial_id, "completed_rung_0", value)
    desk.store.close()
    again = Desk(tmp_path, config, 2)
    Site({0: 1, 1: 1}).drive(again)
    rows = again.rows()
    assert len(rows) == 9
    assert {row.state for row in rows} == {"COMPLETE", "PRUNED", "DIVERGED"}
    assert rows[1].epochs > 1  # that verdict is lost, and the next rung judges
    again.store.close()


def check_kills_on_postgres(pruner: str, sampler: str, folder: Path, every: int) -> None:
    with Postgres() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOPOTUNE_STUDY_URI", server.uri)
        config = remembered(search(pruner, sampler))
        writes = killed(Site(), config, 3, folder / "whole", 10**6)
        expected = found(summaries(SearchFolder.open(folder / "whole", "demo"), config))
        assert len(expected) == 9
        assert writes > 100
        for at in range(0, writes, every):
            site = Site()
            killed(site, config, 3, folder / f"{at}", at)
            desk = Desk(folder / f"{at}", config, 3)
            site.drive(desk)
            rows = found(desk.rows())
            desk.store.close()
            assert rows == expected, at


needs_postgres = pytest.mark.skipif(not installed(), reason="PostgreSQL's server is not installed")


@needs_postgres
@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_a_kill_before_any_write_to_postgres_changes_nothing(pruner: str, tmp_path: Path) -> None:
    check_kills_on_postgres(pruner, "tpe", tmp_path, 1)


@needs_postgres
@pytest.mark.heavy
def test_a_kill_with_a_study_in_postgres_changes_nothing(tmp_path: Path) -> None:
    check_kills_on_postgres("asha", "random", tmp_path, 29)


class Recording(Site):
    """As :class:`Site`, with the records for MLflow that the driver writes."""

    def worked(self, spec: TrialSpec, number: int, first: int = 1) -> Progress:
        """What a worker sends, or its checkpoint holds."""
        reports = self.reports(spec, number, first)
        loads = [Metrics({"system/cpu": 0.5}, r.epoch, r.timestamp_ms) for r in reports]
        start = begun(spec.table(), {"seed": str(spec.seed)}, 10**12)
        return Progress(reports, COST, entries=(start, *loads))

    def session(self, results: Path, config: SearchConfig) -> list[TrialSummary]:
        """Drive to the end; what stops it is raised."""
        desk = Desk(results, config, 3)
        recorder = Recorder(desk.folder, config, rows=list)
        specs = {number: TrialSpec.from_dict(spec) for number, spec in _specs(desk).items()}
        desk.book.record, desk.book._ended = recorder.progress, recorder.ended

        def checkpoint(folder: Path, spec: TrialSpec) -> Progress:
            return self.worked(spec, int(folder.name))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recorder_module, "recorded", checkpoint)
            recorder.start({})
            try:
                recorder.recover(desk.store.rows({}))
                desk.book.take_over(lambda number: self.worked(specs[number], number))
                self.work(desk)
                desk.store.close()
            finally:
                recorder.drop()
        return desk.rows()

    def work(self, desk: Desk) -> None:
        live: dict[int, Handout] = {}
        while True:
            while isinstance(turn := desk.book.next(), Handout):
                live[turn.number] = turn
                desk.book.progress(turn.number, self.worked(turn.spec, turn.number))
            if not live:
                return
            number = min(live, key=lambda n: chance(n, self.trained.get(n, 0), 2))
            epoch = self.trained[number] = self.trained.get(number, 0) + 1
            spec = live[number].spec
            outcome = Outcome.COMPLETE if epoch == spec.epochs else None
            if not desk.book.progress(
                number, replace(self.worked(spec, number, epoch), outcome=outcome)
            ):
                desk.book.end(number)
                del live[number]


def points_of(search: Path) -> list[tuple[object, ...]]:
    """All metrics and ends in an outbox, but for times."""
    points: list[tuple[object, ...]] = []
    for _, entry in read_all(search):
        match entry.body:
            case Epoch(report):
                points.append((entry.trial, report.epoch, str(report.metrics)))
            case Metrics(values, step):
                points += [
                    (entry.trial, name, step, "" if name == "device_seconds" else str(value))
                    for name, value in values.items()
                ]
            case End(outcome, reason):
                points.append((entry.trial, outcome, reason))
    return sorted(points, key=str)


@pytest.mark.parametrize("fault", [None, errno.ENOSPC, errno.EIO], ids=["kill", "full", "broken"])
def test_a_fault_at_a_write_loses_and_repeats_no_record(fault: int | None, tmp_path: Path) -> None:
    """Of the study, its copy or the outbox: what is recorded for MLflow is the undisturbed
    search's, each point once."""
    config, site, writes, at = search("asha", "random", 6, 3), Recording(), 0, -1
    put = files.put

    def watch(handle: int, content: bytes, force: bool = True) -> None:
        nonlocal writes
        if threading.current_thread() is threading.main_thread():  # the other one makes pages
            writes += 1
            if writes == at:
                if fault is None:
                    raise Killed
                put(handle, content[: len(content) // 2], False)
                raise OSError(fault, "No luck")
        put(handle, content, force)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "put", watch)
        expected = found(site.session(tmp_path / "whole", config))
        points = points_of(tmp_path / "whole" / config.name)
        assert len(points) == len(set(points))
        for number in range(1, writes, 5):
            site, writes, at, results = Recording(), 0, number, tmp_path / str(number)
            with pytest.raises((Killed, TopotuneError)):
                site.session(results, config)
            at = -1
            assert found(site.session(results, config)) == expected
            assert points_of(results / config.name) == points
