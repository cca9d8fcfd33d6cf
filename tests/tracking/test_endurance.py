"""What a shipper must stand: silent servers, records that break them, mistakes of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.proxy import Proxy
from topotune.records import EpochReport, Outcome
from topotune.tracking.entries import RUNNING, Item
from topotune.tracking.labels import trial_name
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.shipper import Shipper
from topotune.tracking.spool import SearchTracker, SpoolTracker
from topotune.tracking.store import NewRun, StoredRun, StoreOfflineError
from topotune.tracking.tails import Tails

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's and SQLAlchemy's


class MemoryStore:
    """A store in memory whose ``log`` fails for some runs."""

    label = "memory"
    experiment_id = "1"

    def __init__(self, failure: Exception | None = None, breaks: Sequence[str] = ()) -> None:
        self.failure, self.breaks = failure, breaks
        self.points: dict[str, set[tuple[str, int]]] = {}
        self.made: list[NewRun] = []

    def experiment_tags(self) -> dict[str, str]:
        return {}

    def tag_experiment(self, tags: Mapping[str, str]) -> None: ...

    def runs(self, search_id: str, trial: int | None = None) -> list[StoredRun]:
        return []

    def parent(self, search_id: str) -> StoredRun | None:
        return None

    def create_run(self, run: NewRun) -> str:
        self.made.append(run)
        return run.name

    def log(self, run_id: str, batch: Sequence[Item]) -> None:
        if run_id in self.breaks and self.failure is not None:
            raise self.failure
        self.points.setdefault(run_id, set()).update((item.key, item.step) for item in batch)

    def log_artifact(self, run_id: str, path: Path, folder: str) -> None: ...

    def log_data(self, run_id: str, name: str, digest: str, rows: str) -> None: ...

    def terminate(self, run_id: str, status: str, end_ms: int) -> None: ...

    def reopen(self, run_id: str) -> None: ...


def record(folder: Path, trials: int) -> None:
    for number in range(trials):
        trial = SpoolTracker(folder / f"trials/{number:04d}/spool.jsonl", number)
        trial.epoch(EpochReport(1, 1, {"loss": 1.0}, 0.1, 1_700_000_000_000))


def until(shipper: Shipper, shipped: int) -> None:
    deadline = time.monotonic() + 30
    while shipper.status().shipped < shipped:
        assert time.monotonic() < deadline, shipper.status()
        time.sleep(0.01)


def test_the_thread_survives_a_mistake_of_ours(tmp_path: Path) -> None:
    record(tmp_path, 2)
    store = MemoryStore(KeyError("a bug"), [trial_name(0, RUNNING)])
    shipper = Shipper(tmp_path, store, "s", "demo", interval=0.01)
    shipper.start()
    deadline = time.monotonic() + 30
    while not shipper.status().last_error and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shipper.status().last_error == "KeyError: 'a bug'"
    store.failure = None
    until(shipper, 6)
    assert shipper.close(10).complete
    assert shipper.status().last_error == ""


@pytest.mark.parametrize("failure", [StoreOfflineError("500"), KeyError("a bug")], ids=repr)
def test_records_that_break_the_server_do_not_hold_up_the_others(
    tmp_path: Path, failure: Exception
) -> None:
    record(tmp_path, 8)
    broken = [trial_name(number, RUNNING) for number in range(4)]
    store = MemoryStore(failure, broken)
    shipper = Shipper(tmp_path, store, "s", "demo")
    rounds = 0
    while len(store.points) < 4 and rounds < 10:
        assert not shipper.ship_once()
        rounds += 1
    assert store.points.keys() == {trial_name(number, RUNNING) for number in range(4, 8)}
    store.failure = None
    assert shipper.ship_once()
    assert len(store.points) == 8


@pytest.mark.heavy
@pytest.mark.parametrize("mode", ["mute", "slow"])
def test_closing_is_bounded_whatever_the_server_does(tmp_path: Path, mode: str) -> None:
    record(tmp_path, 40)
    with Proxy(9, mode, delay=1.0) as proxy:
        store = MlflowStore(proxy.url)
        store.preload()
        shipper = Shipper(tmp_path, store, "s", "demo")
        began = time.monotonic()
        counts = shipper.close(timeout=2.0)
        assert time.monotonic() - began < 5.0
        assert counts.pending == counts.recorded == 120
        assert proxy.calls[mode] >= 1


def test_a_page_that_asks_to_log_in_is_no_success(tmp_path: Path) -> None:
    record(tmp_path, 1)
    with Proxy(9, "login") as proxy:
        shipper = Shipper(tmp_path, MlflowStore(proxy.url), "s", "demo")
        assert not shipper.ship_once()
        assert shipper.status().shipped == 0


def test_the_count_is_whole_though_a_request_hangs(tmp_path: Path) -> None:
    hangs = threading.Event()

    class Hanging(MemoryStore):
        def log(self, run_id: str, batch: Sequence[Item]) -> None:
            hangs.set()
            time.sleep(3)

    record(tmp_path, 1)
    shipper = Shipper(tmp_path, Hanging(), "s", "demo", interval=0.01)
    shipper.start()
    assert hangs.wait(30)
    record(tmp_path, 3)
    counts = shipper.close(0.1)
    assert (counts.recorded, counts.shipped, counts.pending) == (9, 0, 9)
    assert shipper._thread is not None
    shipper._thread.join()


def test_an_idle_spool_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path, 3)
    tails = Tails(tmp_path)
    tails.count()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("topotune.tracking.tails.read_piece", refuse)
    with caplog.at_level(logging.WARNING):
        tails.count()
    assert (tails.items, caplog.records) == (9, [])


def test_a_run_begins_when_its_trial_began(tmp_path: Path) -> None:
    """Also where the driver's record of its end was seen first, as that spool is the oldest."""
    store, driver = MemoryStore(), SearchTracker(tmp_path)
    driver.start({}, {})
    shipper = Shipper(tmp_path, store, "s", "demo")
    assert shipper.ship_once()
    for number in range(2):
        trial = SpoolTracker(tmp_path / f"trials/{number:04d}/spool.jsonl", number)
        trial.start({}, {})
        trial.metrics({"loss": 1.0}, 0, 5)
        time.sleep(0.05)
        ended = time.time_ns() // 1_000_000
        driver.trial_metrics(number, {"device_seconds": 1.0}, 0, ended)
        driver.trial_end(number, Outcome.COMPLETE, "")
        assert shipper.ship_once()
        assert [run.trial for run in store.made][1:] == list(range(number + 1))
        assert store.made[-1].start_ms <= ended - 50
