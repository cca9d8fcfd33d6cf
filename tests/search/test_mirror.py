"""The driver's side of a search in an object store, and a worker killed at any point of a push."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from tests.faults.task import IMPORT_PATH
from tests.object_server import CREDENTIALS, ObjectServer
from tests.postgres import Postgres
from tests.search_cases import make_config
from topotune.config.budget import Limits
from topotune.config.models import SearchConfig
from topotune.errors import ConfigError, LeaseLostError, ResourceError, SearchFolderError
from topotune.records import EpochReport, Outcome, OverheadOptions, TrialSpec
from topotune.search import driver, status
from topotune.search.drive.book import Progress
from topotune.search.drive.recorder import recorded
from topotune.search.place import lease as leases
from topotune.search.place.addresses import public_study
from topotune.search.place.folder import SearchFolder, searches
from topotune.search.place.lease import Holder, this_machine
from topotune.search.place.objects import mirror as mirrors
from topotune.search.place.objects.address import SCRATCH, StoreAddress, results_folder
from topotune.search.place.objects.files import TrialFiles
from topotune.search.place.objects.mirror import Mirror
from topotune.search.place.objects.replica import Replica
from topotune.search.place.objects.store import ObjectStore
from topotune.search.place.row_lease import RowLease, row_holder
from topotune.search.place.search_lease import SearchLease, holder
from topotune.search.ray.tune import PAYLOAD
from topotune.search.ray.worker import TrialActor, trial_config
from topotune.search.study.patience import Patience
from topotune.search.study.store import StudyStore
from topotune.search.view import SilentListener
from topotune.settings import STUDY_URI, TRACKING_URI
from topotune.train.trial import TIMING_METRICS

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as running:
        running.bucket("bucket")
        yield running


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with Postgres() as running:
        yield running


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(SCRATCH, str(tmp_path / "one"))


@pytest.fixture
def place(server: ObjectServer, tmp_path: Path) -> str:
    return server.address(f"bucket/{tmp_path.name}")


@pytest.fixture
def config(database: Postgres, monkeypatch: pytest.MonkeyPatch) -> SearchConfig:
    monkeypatch.setenv(STUDY_URI, database.uri)
    uri = public_study(make_url(database.uri))
    return make_config(study={"uri": uri}, tracking={"uri": NOWHERE})


def _mirror(place: str) -> Mirror:
    return Mirror(results_folder(place), StoreAddress.parse(place), "demo", SilentListener())


def _wait(condition: object, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_what_the_driver_writes_goes_and_what_workers_write_comes(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "EVERY_SECONDS", 0.2)
    store = ObjectStore(StoreAddress.parse(place))
    one, live = _mirror(place), {3}
    one.open()
    home = one.root / "trials" / "0003"
    home.mkdir(parents=True)
    (one.root / "search.json").write_text("{}")
    one.begin(lambda: live)
    assert store.read("demo/search.json") == b"{}"
    (home / "crash-1.txt").write_text("handed out")
    (one.root / "driver.lock").write_text("stays here")
    (one.root / "study.jsonl").write_text("one")
    _wait(lambda: store.read("demo/trials/0003/crash-1.txt") == b"handed out")
    _wait(lambda: store.read("demo/study.jsonl") == b"one")
    for name in ("error.txt", "checkpoint.pt", "trace/epoch-00001.npz"):
        store.write(f"demo/trials/0003/{name}", b"of a worker")
    one.fetch(3)
    assert (home / "error.txt").read_bytes() == b"of a worker"
    assert (home / "trace" / "epoch-00001.npz").read_bytes() == b"of a worker"
    assert not (home / "checkpoint.pt").exists()
    one.fetch(3, "checkpoint.pt")
    assert (home / "checkpoint.pt").read_bytes() == b"of a worker"
    (home / "checkpoint.pt").unlink()
    (home / "trace.npz").write_text("joined")
    one.forget(3, "trace/")
    one.forget(3, "checkpoint.pt", "checkpoint.previous.pt")
    _wait(lambda: "trials/0003/checkpoint.pt" not in store.objects("demo"))
    _wait(lambda: "trials/0003/trace/epoch-00001.npz" not in store.objects("demo"))
    assert store.read("demo/trials/0003/trace.npz") == b"joined"
    (one.root / "leaderboard.md").write_text("final")
    assert one.finish(hurry=False) == ""
    one.close()
    assert set(store.objects("demo")) == {
        *("driver.claim", "search.json", "study.jsonl", "leaderboard.md"),
        *("trials/0003/crash-1.txt", "trials/0003/trace.npz", "trials/0003/error.txt"),
    }

    monkeypatch.setenv(SCRATCH, str(tmp_path / "two"))
    two = _mirror(place)
    two.open()
    assert (two.root / "leaderboard.md").read_text() == "final"
    assert (two.root / "trials" / "0003" / "trace.npz").read_text() == "joined"
    (two.root / "study.jsonl").write_text("two")
    two.begin(dict)
    monkeypatch.setenv(SCRATCH, str(tmp_path / "one"))
    (one.root / "study.jsonl").write_text("of the past")
    with pytest.raises(LeaseLostError, match="demo was taken over by pid"):
        one.finish(hurry=False)
    assert store.read("demo/study.jsonl") == b"two"
    two.close()
    again = _mirror(place)  # the first machine, behind by now
    again.open()
    assert (again.root / "study.jsonl").read_text() == "two"
    again.close()


def test_traces_that_were_not_joined_are_found_by_the_next_driver(place: str) -> None:
    store = ObjectStore(StoreAddress.parse(place))
    for name in ("0003/trace/epoch-00001.npz", "0004/trace.npz", "0005/checkpoint.pt"):
        store.write(f"demo/trials/{name}", b"of a worker")
    one = _mirror(place)
    chunks = one.root / "trials" / "0003" / "trace"
    chunks.mkdir(parents=True)
    (chunks / "epoch-00002.npz").write_text("of a worker that the next one did not go on from")
    one.open()
    files = TrialFiles(SearchFolder(one.root), one)
    assert [number for number in range(6) if files.has_chunks(number)] == [3]
    files.fetch(3)
    assert [path.name for path in chunks.iterdir()] == ["epoch-00001.npz"]
    one.close()


def test_a_checkpoint_goes_after_what_was_recorded_of_its_trial(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that is lost with its disk has left one of the two in the store."""
    monkeypatch.setattr(mirrors, "EVERY_SECONDS", 0.2)
    monkeypatch.setattr(mirrors, "BYTES_PER_SECOND", 1)  # it is not yet time to send it again
    store, done = ObjectStore(StoreAddress.parse(place)), list[str]()
    real, gone = ObjectStore.upload, ObjectStore.delete

    def upload(self: ObjectStore, path: Path, name: str) -> bool:
        done.append(f"sent {name}")
        return real(self, path, name)

    def delete(self: ObjectStore, name: str) -> None:
        done.append(f"gone {name}")
        gone(self, name)

    one = _mirror(place)
    one.open()
    (one.root / "outbox.jsonl").write_text("one epoch")
    store.write("demo/trials/0003/checkpoint.pt", b"of a worker")
    one.begin(tuple)
    _wait(lambda: store.read("demo/outbox.jsonl") == b"one epoch")
    monkeypatch.setattr(ObjectStore, "upload", upload)
    monkeypatch.setattr(ObjectStore, "delete", delete)
    (one.root / "outbox.jsonl").write_text("two epochs and the end")
    one.forget(3, "checkpoint.pt")
    _wait(lambda: "gone demo/trials/0003/checkpoint.pt" in done)
    assert done.index("sent demo/outbox.jsonl") < done.index("gone demo/trials/0003/checkpoint.pt")
    assert store.read("demo/outbox.jsonl") == b"two epochs and the end"
    one.close()


def test_a_driver_that_lost_the_search_in_the_store_is_told(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "EVERY_SECONDS", 0.2)
    one = _mirror(place)
    one.open()
    one.begin(dict)
    one.check()
    ObjectStore(StoreAddress.parse(place)).write("demo/driver.claim", b'{"pid": 7, "host": "far"}')
    (one.root / "study.jsonl").write_text("x")

    def told() -> bool:
        try:
            one.check()
        except LeaseLostError as error:
            return "by pid 7 on far" in str(error)
        return False

    _wait(told)
    assert ObjectStore(StoreAddress.parse(place)).read("demo/study.jsonl") is None
    one.close()


def test_what_cannot_be_saved_is_told_and_saved_later(
    server: ObjectServer, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "FINISH_SECONDS", 1.0)
    monkeypatch.setattr(mirrors, "FINISH_SECONDS_HURRY", 1.0)
    one = _mirror(place)
    one.open()
    one.begin(dict)
    (one.root / "leaderboard.md").write_text("final")
    server.gate.close()
    try:
        for hurry in (True, False):
            began = time.monotonic()
            text = one.finish(hurry)
            assert "not all of it is saved in s3://bucket/" in text
            assert str(one.root) in text
            assert "topotune sync demo --results-dir 's3://bucket/" in text
            assert time.monotonic() - began < 12
        one.close()
    finally:
        server.gate.open()
    again = _mirror(place)
    again.open()
    assert (again.root / "leaderboard.md").read_text() == "final"  # ahead of the store: kept
    again.begin(dict)
    store = ObjectStore(StoreAddress.parse(place))
    assert store.read("demo/leaderboard.md") == b"final"
    again.close()


def test_names_that_lead_elsewhere_are_not_brought(place: str, tmp_path: Path) -> None:
    store = ObjectStore(StoreAddress.parse(place))
    bad = ("trials/0000/.hidden", "trials/0000/a/b/c/d.txt", "trials/0000/x y", "study.db")
    for name in bad:
        store.write(f"demo/{name}", b"x")
    one = _mirror(place)
    one.open()
    one.close()
    assert not [path for path in one.root.rglob("*") if path.is_file()]


def test_one_driver_at_a_time_across_machines(
    database: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "EXPIRY_SECONDS", 3.0)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.3)
    url, told = make_url(database.uri), list[str]()

    def take() -> RowLease:
        return RowLease(url, "s3://bucket/x/demo", Patience("db", told.append, 5.0))

    assert row_holder(url, "s3://bucket/x/demo") is None
    with take() as first:
        first.check()
        assert f"pid {first._me.pid} on" in str(row_holder(url, "s3://bucket/x/demo"))
        with pytest.raises(SearchFolderError, match=r"is being driven by pid \d+ on "), take():
            pass
        with RowLease(url, "s3://bucket/x/other", Patience("db")):
            pass
    assert row_holder(url, "s3://bucket/x/demo") is None

    def left_by(holder: Holder) -> None:
        """As a driver that was killed leaves it."""
        gone = take()
        with gone:
            assert gone._swap(gone._held, holder.to_json())

    left_by(Holder(1, "another-host", "another machine", "dead"))
    assert str(row_holder(url, "s3://bucket/x/demo")) == "pid 1 on another-host"
    began = time.monotonic()
    with take() as second:
        assert time.monotonic() - began >= 3.0
        second.check()
        assert told[-2:] == [
            "pid 1 on another-host holds this search; watching for 3 s whether it lives",
            "pid 1 on another-host is dead; taking over",
        ]
        time.sleep(1.0)
        second.check()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left_by(Holder(ended.pid, "here", this_machine(), "dead"))
    assert row_holder(url, "s3://bucket/x/demo") is None
    began = time.monotonic()
    with take():  # a process of this machine that is gone needs no watching
        assert time.monotonic() - began < 3.0


def test_a_driver_that_was_cut_off_is_told_and_a_restarted_database_costs_nobody_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.3)
    with Postgres() as database:
        url = make_url(database.uri)
        with RowLease(url, "s3://bucket/demo", Patience("db")) as mine:
            database.stop()
            time.sleep(1.2)
            mine.check()  # nobody can take it now, either
            database.start()
            time.sleep(1.5)
            mine.check()
            with mine._working:  # suspended; meanwhile another machine watched it to the end
                other = replace(mine._me, host="far", token="another")
                assert mine._swap(mine._held, other.to_json())
            _wait(lambda: mine._lost)
            with pytest.raises(LeaseLostError, match=r"taken over by pid \d+ on far"):
                mine.check()
        assert "on far" in str(row_holder(url, "s3://bucket/demo"))  # left alone by who lost it


def test_a_search_is_found_by_any_machine_with_little_of_it_brought(
    place: str, config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = results_folder(place)
    folder = SearchFolder.check_free(results, config)
    folder.root.mkdir(parents=True)
    with SearchLease(folder, config, SilentListener()) as lease:
        SearchFolder.create(results, config, "# the file")
        (folder.trial(0)).mkdir()
        (folder.root / "leaderboard.md").write_text("large")
        lease.begin()
        store = StudyStore(folder, config)
        assert store.next() is not None
        store.close()
        (folder.trial(0) / "crash-1.txt").write_text("newer than the store")
        assert "nothing" in status.printed(results, "demo", 0)
        assert (folder.trial(0) / "crash-1.txt").read_text() == "newer than the store"
        assert "pid" in str(holder(folder, config))
        with pytest.raises(SearchFolderError, match="is being driven by"):
            status.sync(results, "demo", 1.0)
    assert holder(folder, config) is None

    monkeypatch.setenv(SCRATCH, str(tmp_path / "two"))
    there = results_folder(place)
    assert [one.name for one in searches(there)] == ["demo"]
    found = SearchFolder.open(there, "demo")
    assert found.config() == config
    assert {path.name for path in found.root.rglob("*") if path.is_file()} == {"search.json"}
    assert status.status(there, "demo").state == "stopped"
    with pytest.raises(SearchFolderError, match="Continue it with 'topotune resume demo'"):
        SearchFolder.check_free(there, config)
    with pytest.raises(SearchFolderError, match=r"^'s3://bucket/.*: no search named 'absent'"):
        SearchFolder.open(there, "absent")
    with pytest.raises(ConfigError, match="no embedded MLflow store"):
        status.serve(there, None, 0, print)
    for name in ObjectStore(StoreAddress.parse(place)).objects("demo"):
        ObjectStore(StoreAddress.parse(place)).delete(f"demo/{name}")
    with pytest.raises(SearchFolderError, match="no search named 'demo'"):
        SearchFolder.open(there, "demo")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tracking": {"uri": NOWHERE}}, ("holds no study file", f"{STUDY_URI}=postgresql://")),
        (
            {"study": {"uri": "postgresql://u@127.0.0.1:9/x"}},
            ("MLflow's embedded store", f"{TRACKING_URI}=http://"),
        ),
        (
            {
                "study": {"uri": "postgresql://u@127.0.0.1:9/x"},
                "tracking": {"uri": "sqlite:////tmp/x.db"},
            },
            ("MLflow's embedded store", f"{TRACKING_URI}=http://"),
        ),
    ],
)
def test_files_of_one_machine_are_refused_before_anything_is_done(
    changes: dict[str, object],
    words: tuple[str, ...],
    server: ObjectServer,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(STUDY_URI, raising=False)
    monkeypatch.delenv(TRACKING_URI, raising=False)
    before = len(server.requests())
    with pytest.raises(ConfigError) as caught:
        driver.start(make_config(**changes), "", results_folder(place), SilentListener())
    assert all(word in str(caught.value) for word in words)
    assert len(server.requests()) == before


class Killed(BaseException):
    """Stands for a kill: nothing of the process's memory is used afterwards."""


EPOCHS = 3


def _spec() -> TrialSpec:
    return TrialSpec(
        task=IMPORT_PATH,
        method="topological_adam",
        params={"lr": 0.01},
        epochs=EPOCHS,
        seed=3,
        overhead=OverheadOptions(blocks=0),
        threads=1,
    )


def _step(actor: TrialActor) -> Progress:
    return Progress.from_json(actor.step()[PAYLOAD])


def _train(
    place: str, patch: pytest.MonkeyPatch, scratch: Path, dies_at: int | None = None
) -> list[EpochReport]:
    """Work on a trial on a node until it ends or its worker dies in a request; what was told."""
    patch.setenv(SCRATCH, str(scratch))
    count = 0
    real, note = ObjectStore.write, Replica._note_down

    def dead() -> bool:
        return dies_at is not None and count > dies_at

    def write(self: ObjectStore, name: str, content: bytes) -> None:
        nonlocal count
        count += not name.endswith(".claim")
        if dead():
            raise Killed
        real(self, name, content)

    def note_down(self: Replica) -> None:
        if not dead():
            note(self)

    told: list[EpochReport] = []
    limits = Limits(stall=None, memory=None)
    with patch.context() as inner:
        inner.setattr(ObjectStore, "write", write)
        inner.setattr(Replica, "_note_down", note_down)
        search = results_folder(place) / "demo"
        actor = TrialActor(config=trial_config(0, _spec(), search, limits, scratch))
        try:
            while True:
                progress = _step(actor)
                assert not progress.stop
                told += progress.reports
                if progress.outcome is not None:
                    assert progress.outcome is Outcome.COMPLETE, progress.reason
                    actor.cleanup()
                    break
        except Killed:
            if actor._guard is not None:
                actor._guard.close()
    return told


def _untimed(report: EpochReport) -> dict[str, float]:
    return {k: v for k, v in report.metrics.items() if k not in TIMING_METRICS}


def kept(store: ObjectStore, folder: Path) -> Path:
    """A folder with the checkpoint that a trial has in the store."""
    folder.mkdir()
    store.download("demo/trials/0000/checkpoint.pt", folder / "checkpoint.pt")
    return folder


@pytest.mark.heavy
def test_a_worker_killed_at_any_point_of_a_push_loses_and_repeats_no_epoch(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each object that it writes, then going on at another node and at its own."""
    whole = _train(f"{place}", monkeypatch, tmp_path / "whole")
    assert [report.epoch for report in whole] == list(range(1, EPOCHS + 1))
    store = ObjectStore(StoreAddress.parse(place))
    written = [r for r in store.objects("demo/trials/0000") if not r.endswith(".claim")]
    assert "checkpoint.pt" in written
    deaths, finished = 0, False
    while not finished:
        for own in (True, False):
            for name in store.objects("demo"):
                store.delete(f"demo/{name}")
            node = tmp_path / f"node-{deaths}-{own}"
            first = _train(place, monkeypatch, node, dies_at=deaths)
            finished = len(first) == EPOCHS
            held = recorded(kept(store, tmp_path / f"held-{deaths}-{own}"), _spec()).reports
            after = node if own else tmp_path / f"other-{deaths}"
            second = _train(place, monkeypatch, after)
            assert [report.epoch for report in second] == list(range(1, EPOCHS + 1))
            assert second[: len(first)] == first  # stamps and all: given again, not trained again
            assert list(map(_untimed, second)) == list(map(_untimed, whole))
            # What was told is in the store, and perhaps one epoch more that is told later.
            assert held[: len(first)] == tuple(first)
            assert held == tuple(second[: len(held)])
            last = recorded(kept(store, tmp_path / f"read-{deaths}-{own}"), _spec())
            assert last.reports == tuple(second)
        deaths += 1
    assert deaths > 2 * EPOCHS


def test_a_store_that_stays_away_stops_the_search_and_the_epoch_is_told_by_the_next_worker(
    server: ObjectServer, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node"))
    search = results_folder(place) / "demo"
    settings = trial_config(0, _spec(), search, Limits(stall=None, memory=None), tmp_path)
    actor = TrialActor(config=settings)
    first = _step(actor)
    assert [report.epoch for report in first.reports] == [1]
    assert actor._courier is not None
    actor._courier._replica.store.limit = 0.5
    server.gate.close()
    try:
        stopped = _step(actor)
    finally:
        server.gate.open()
    assert not stopped.reports
    assert "go on when it is back" in stopped.stop
    folder = actor._folder
    actor.cleanup()
    assert folder.exists()  # it holds an epoch that the store does not
    again = TrialActor(config=settings)
    progress = _step(again)
    assert [report.epoch for report in progress.reports] == [1, 2]
    again.cleanup()
    assert not folder.exists()
    assert json.loads(settings["spec"])["epochs"] == EPOCHS
    assert "secret" not in json.dumps(settings)


def test_a_store_that_refuses_is_found_before_a_search_begins(
    server: ObjectServer, config: SearchConfig
) -> None:
    results = results_folder(server.address("no-such-bucket/x"))
    with pytest.raises(ResourceError, match="NO_SUCH_BUCKET"):
        driver.start(config, "", results, SilentListener())
