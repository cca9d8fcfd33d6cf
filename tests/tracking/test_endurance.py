"""What a shipper must stand: silent servers, records that break them, mistakes of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.proxy import Proxy
from tests.tracking.memory import MemoryStore
from topotune.records import EpochReport, Outcome
from topotune.tracking.entries import RUNNING, Epoch, Item, Metrics
from topotune.tracking.labels import trial_name
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.outbox import Outbox
from topotune.tracking.shipper import Shipper
from topotune.tracking.store import StoreOfflineError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's and SQLAlchemy's


def record(folder: Path, trials: int) -> None:
    outbox = Outbox(folder)
    for number in range(trials):
        outbox.put(number, Epoch(EpochReport(1, 1, {"loss": 1.0}, 0.1, 1_700_000_000_000)))


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


def test_an_idle_outbox_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path, 3)
    shipper = Shipper(tmp_path, MemoryStore(), "s", "demo")
    assert shipper.ship_once()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("topotune.tracking.shipper.read_piece", refuse)
    with caplog.at_level(logging.WARNING):
        assert shipper.ship_once()
    assert (shipper.status().shipped, caplog.records) == (9, [])


def test_a_run_begins_when_its_trial_began(tmp_path: Path) -> None:
    store, outbox = MemoryStore(), Outbox(tmp_path)
    outbox.start(None, {}, {})
    shipper = Shipper(tmp_path, store, "s", "demo")
    assert shipper.ship_once()
    for number in range(2):
        outbox.start(number, {}, {})
        outbox.metrics(number, {"loss": 1.0}, 0, 5)
        time.sleep(0.05)
        ended = time.time_ns() // 1_000_000
        spent = Metrics({"device_seconds": 1.0}, 0, ended)
        outbox.end(number, Outcome.COMPLETE, "", spent)
        assert shipper.ship_once()
        assert [run.trial for run in store.made][1:] == list(range(number + 1))
        assert store.made[-1].start_ms <= ended - 50


def test_a_search_begins_before_its_trials_where_all_is_sent_at_once(tmp_path: Path) -> None:
    store, outbox = MemoryStore(), Outbox(tmp_path)
    outbox.start(None, {}, {})
    time.sleep(0.02)
    outbox.start(0, {}, {})
    assert Shipper(tmp_path, store, "s", "demo").ship_once()
    assert [run.trial for run in store.made] == [None, 0]
    assert store.made[0].start_ms < store.made[1].start_ms


def test_what_is_saved_as_sent_ends_before_what_the_store_failed_on(tmp_path: Path) -> None:
    """A shipper that is killed meanwhile loses nothing, and its successor sends it."""
    record(tmp_path, 3)
    store = MemoryStore(StoreOfflineError("500"), [trial_name(1, RUNNING)])
    first = Shipper(tmp_path, store, "s", "demo")
    assert not first.ship_once()
    Outbox(tmp_path).put(1, Epoch(EpochReport(2, 2, {"loss": 0.5}, 0.1, 1_700_000_000_001)))
    Outbox(tmp_path).put(2, Epoch(EpochReport(2, 2, {"loss": 0.5}, 0.1, 1_700_000_000_001)))
    assert not first.ship_once()
    status = first.status()
    assert (status.recorded, status.shipped, status.pending) == (15, 9, 6)
    assert ("loss", 2) in store.points[trial_name(2, RUNNING)]
    second = Shipper(tmp_path, MemoryStore(), "s", "demo")
    assert second.status().shipped == 0
    store.failure = None
    again = Shipper(tmp_path, store, "s", "demo")
    assert again.close(10).complete
    assert ("loss", 2) in store.points[trial_name(1, RUNNING)]
    assert first.close(10).complete
