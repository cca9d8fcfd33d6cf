"""Shipping to a real MLflow store: everything once, in the right run, whatever goes wrong."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.reconcile import StoredCheck, reconcile
from tests.tracking.memory import Run
from topotune.errors import TrackingError
from topotune.records import EpochReport, Outcome
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.outbox import OUTBOX_FILE
from topotune.tracking.places import is_inside
from topotune.tracking.progress import PROGRESS_FILE
from topotune.tracking.registry import register_model
from topotune.tracking.shipper import Shipper
from topotune.tracking.store import NewRun, StoredRun

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's and SQLAlchemy's


@pytest.fixture(scope="module")
def results_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results of all searches #1")


@pytest.fixture(scope="module")
def store(results_dir: Path) -> MlflowStore:
    """One embedded store for the module: making one takes seconds."""
    store = MlflowStore.embedded(results_dir)
    store.ping()
    return store


@dataclass
class Search:
    """A search's folder, its outbox and its shipper."""

    folder: Path
    store: MlflowStore
    search_id: str

    def trial(self, number: int) -> Run:
        return Run(self.folder, number)

    def driver(self) -> Run:
        return Run(self.folder, None)

    def shipper(self, interval: float = 0.05) -> Shipper:
        return Shipper(self.folder, self.store, self.search_id, self.folder.name, interval)

    def run(self, trial: int) -> StoredRun:
        (run,) = self.store.runs(self.search_id, trial)
        return run

    def steps(self, trial: int, key: str) -> list[int]:
        history = self.store.client().get_metric_history(self.run(trial).run_id, key)
        return [point.step for point in history]

    def check(self) -> StoredCheck:
        return reconcile(self.folder, self.store, self.search_id)

    def parent(self) -> StoredRun:
        found = self.store.parent(self.search_id)
        assert found is not None
        return found


@pytest.fixture
def search(tmp_path: Path, store: MlflowStore) -> Search:
    folder = tmp_path / "digits"
    folder.mkdir()
    return Search(folder, store, uuid.uuid4().hex)


def report(epoch: int, **metrics: float) -> EpochReport:
    values = {"val_loss": 1.0 / epoch, **metrics}
    return EpochReport(epoch, 10 * epoch, values, 0.5, 1_700_000_000_000 + epoch)


def small_search(search: Search, trials: int = 2, epochs: int = 3) -> None:
    driver = search.driver()
    driver.start({"sampler": "tpe"}, {"mlflow.note.content": "# A search\n\n| trial |"})
    for number in range(trials):
        trial = search.trial(number)
        trial.start({"lr": 0.1, "betas": [0.9, 0.99]}, {"device": "cpu"})
        for epoch in range(1, epochs + 1):
            trial.epoch(report(epoch))
        trial.metrics({"overhead_vs_adam": 1.1}, 0, 1_700_000_000_000)


def test_everything_arrives_in_a_parent_and_its_children(search: Search) -> None:
    small_search(search, trials=3)
    trace = search.folder / "trials/0001/trace.npz"
    trace.parent.mkdir(parents=True)
    trace.write_bytes(b"points")
    search.trial(1).artifact(trace, "traces")
    outcomes = (Outcome.COMPLETE, Outcome.PRUNED, Outcome.DIVERGED)
    for number, outcome in enumerate(outcomes):
        search.trial(number).end(outcome, f"why {number}")
    search.driver().end("INTERRUPTED", "stopped by SIGINT")
    shipper = search.shipper()
    assert shipper.ship_once()
    counts = shipper.close()
    assert counts.complete
    assert (counts.refused, counts.pending) == (0, 0)
    parent, client = search.parent(), search.store.client()
    assert parent.status == "KILLED"
    assert parent.tags["mlflow.runName"] == "digits"
    assert parent.tags["mlflow.note.content"].startswith("# A search")
    runs = [search.run(number) for number in range(3)]
    assert [run.status for run in runs] == ["FINISHED", "KILLED", "FAILED"]
    assert [run.tags["topotune.outcome"] for run in runs] == [o.value for o in outcomes]
    assert {run.tags["mlflow.parentRunId"] for run in runs} == {parent.run_id}
    assert runs[2].tags["mlflow.runName"] == "2 · running"
    assert client.get_run(runs[0].run_id).data.params == {"lr": "0.1", "betas": "[0.9, 0.99]"}
    assert search.steps(0, "val_loss") == [1, 2, 3]
    assert runs[0].latest == {
        "val_loss": 1 / 3,
        "optimizer_step": 30.0,
        "epoch_seconds": 0.5,
        "overhead_vs_adam": 1.1,
    }
    (kept,) = client.list_artifacts(runs[1].run_id, "traces")
    assert (kept.path, kept.file_size) == ("traces/trace.npz", 6)
    check = search.check()
    assert check.complete
    assert (check.recorded, check.stored, check.runs) == (30, 30, 4)


def test_the_data_of_a_trial_are_a_dataset_input_however_often_they_are_sent(
    search: Search,
) -> None:
    search.driver().start({}, {"topotune.task": "my_tasks:Rings", "topotune.method": "adam"})
    for number, digest in enumerate(("aaaa", "aaaa", "bbbb")):
        tags = {"data.digest": digest, "data.rows": "60 train, 20 validation"}
        search.trial(number).start({}, tags)
    search.trial(3).start({}, {"device": "cpu"})
    for _ in range(3):
        assert search.shipper().close().complete
        (search.folder / PROGRESS_FILE).unlink()

    def inputs(run: StoredRun) -> list[tuple[str, ...]]:
        found = search.store.client().get_run(run.run_id).inputs
        assert found is not None
        return [
            (one.dataset.name, one.dataset.digest, str(one.dataset.profile), one.tags[0].value)
            for one in found.dataset_inputs
        ]

    a, b = (
        ("Rings", digest, '{"rows": "60 train, 20 validation"}', "training")
        for digest in ("aaaa", "bbbb")
    )
    assert [inputs(search.run(number)) for number in range(4)] == [[a], [a], [b], []]
    assert sorted(inputs(search.parent())) == [a, b]


def test_losing_the_offsets_duplicates_nothing(search: Search) -> None:
    small_search(search)
    search.trial(0).epoch(report(4, nan=math.nan, inf=math.inf))
    assert search.shipper().ship_once()
    before = search.check()
    (search.folder / "shipped.json").unlink()
    assert search.shipper().ship_once()
    (search.folder / "shipped.json").write_text('{"store": "damaged')
    again = search.shipper()
    assert again.ship_once()
    assert search.check() == before
    assert before.complete
    assert before.runs == 3
    assert again.status().shipped == again.status().recorded


def test_a_crash_between_making_a_run_and_saving_does_not_make_another(search: Search) -> None:
    parent = search.store.create_run(NewRun(search.search_id, None, "digits", 5))
    child = search.store.create_run(NewRun(search.search_id, 0, "trial-0000", 5, parent))
    small_search(search, trials=1)
    shipper = search.shipper()
    assert shipper.ship_once()
    assert (search.parent().run_id, search.run(0).run_id) == (parent, child)
    assert search.check().complete


def test_an_empty_second_run_is_cleaned_up(search: Search) -> None:
    small_search(search, trials=1)
    shipper = search.shipper()
    assert shipper.ship_once()
    kept = search.run(0).run_id
    search.store.create_run(NewRun(search.search_id, 0, "trial-0000", 1))  # older, and empty
    check = search.check()
    assert check.complete
    assert [run.run_id for run in search.store.runs(search.search_id, 0) if not run.deleted] == [
        kept
    ]


def test_an_infinity_is_stored_as_a_note_and_nan_as_nan(search: Search) -> None:
    search.trial(0).epoch(report(2, energy=-math.inf, loss=math.nan))
    shipper = search.shipper()
    assert shipper.ship_once()
    latest = search.run(0).latest
    assert latest["energy_nonfinite"] == -1.0
    assert "energy" not in latest
    assert math.isnan(latest["loss"])
    assert search.check().complete


def test_a_refused_item_is_set_aside_and_the_rest_arrives(search: Search) -> None:
    trial = search.trial(0)
    trial.start({}, {})
    shipper = search.shipper()
    assert shipper.ship_once()
    search.store.client().log_param(search.run(0).run_id, "lr", "9")
    trial.start({"eta": 0.5, "lr": 0.1, "mu0": 0.2}, {"device": "cpu"})
    trial.epoch(report(1))
    gone = search.folder / "gone.txt"
    gone.write_text("x")
    trial.artifact(gone)
    gone.unlink()
    assert shipper.ship_once()
    counts = shipper.close()
    assert (counts.refused, counts.pending) == (2, 0)
    assert counts.recorded == counts.shipped + 2
    assert not counts.complete
    params = search.store.client().get_run(search.run(0).run_id).data.params
    assert params == {"lr": "9", "eta": "0.5", "mu0": "0.2"}
    refused = (search.folder / "refused.jsonl").read_text()
    assert '"key": "lr"' in refused
    assert "no such file" in refused
    (search.folder / "shipped.json").unlink()
    again = search.shipper()
    assert again.ship_once()
    assert again.status().refused == 2
    assert search.check().complete


def test_a_run_that_has_ended_can_begin_again(search: Search) -> None:
    trial, shipper = search.trial(0), search.shipper()
    trial.start({}, {})
    trial.end(Outcome.PRUNED, "rung 2")
    assert shipper.ship_once()
    assert search.run(0).tags["topotune.outcome"] == "PRUNED"
    time.sleep(0.005)  # begins again in a later millisecond
    trial.start({}, {"attempt": "2"})
    assert shipper.ship_once()
    assert search.run(0).status == "RUNNING"
    trial.end(Outcome.FAILED, "out of memory")
    assert shipper.ship_once()
    run = search.run(0)
    assert (run.status, run.tags["topotune.outcome"]) == ("FAILED", "FAILED")
    assert run.tags["topotune.reason"] == "out of memory"


def test_the_newest_content_of_an_artifact_and_tag_wins(search: Search) -> None:
    driver, shipper = search.driver(), search.shipper()
    board = search.folder / "leaderboard.json"
    for version in ("one", "three"):
        board.write_text(version)
        driver.artifact(board)
        driver.tags({"best": version})
        if version == "one":
            assert shipper.ship_once()
    assert shipper.ship_once()
    parent = search.parent()
    (kept,) = search.store.client().list_artifacts(parent.run_id)
    assert kept.file_size == len("three")
    assert parent.tags["best"] == "three"


def test_batches_stay_within_mlflows_limits(search: Search) -> None:
    trial = search.trial(0)
    params = {f"p{n:03d}": "é" * 7000 for n in range(130)}
    trial.start(params, {f"t{n}": "x" * 9000 for n in range(120)})
    trial.metrics({f"m{n}": float(n) for n in range(1100)}, 0, 5)
    shipper = search.shipper()
    assert shipper.ship_once()
    assert shipper.close().complete
    data = search.store.client().get_run(search.run(0).run_id).data
    assert (len(data.metrics), len(data.params)) == (1100, 130)
    assert {len(text) for text in data.params.values()} == {6000}
    assert len(data.tags["t119"]) == 8000


def test_the_background_thread_ships_while_a_trial_runs(search: Search) -> None:
    shipper = search.shipper(interval=0.01)
    shipper.start()
    trial = search.trial(0)
    trial.epoch(report(1))
    deadline = time.monotonic() + 30
    while shipper.status().shipped < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert shipper.status().shipped == 3
    trial.epoch(report(2))
    trial.end(Outcome.COMPLETE, "")
    counts = shipper.close(timeout=30)
    assert counts.complete
    assert counts.recorded == 9
    assert search.run(0).status == "FINISHED"


def test_two_shippers_at_once_make_one_run_a_trial(search: Search) -> None:
    small_search(search, trials=4)
    shippers = [search.shipper() for _ in range(3)]
    threads = [threading.Thread(target=s.close, args=(30,)) for s in shippers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check = search.check()
    assert check.complete
    assert check.runs == 5
    assert [s.status().pending for s in shippers] == [0, 0, 0]


def test_a_server_that_is_down_is_reported_and_keeps_everything(search: Search) -> None:
    small_search(search)
    down = MlflowStore("http://user:hunter2@127.0.0.1:9")
    shipper = Shipper(search.folder, down, search.search_id, "digits", 0.01)
    counts = shipper.close(timeout=0.5)
    assert (counts.shipped, counts.refused) == (0, 0)
    assert counts.pending == counts.recorded > 0
    status = shipper.status()
    assert "Connection refused" in status.last_error
    assert "hunter2" not in repr(status) + down.label
    assert status.offline_since is not None
    recovered = search.shipper()
    assert recovered.close().recorded == counts.recorded
    assert search.check().complete


def test_a_change_of_store_sends_everything_again(search: Search, tmp_path: Path) -> None:
    small_search(search, trials=1)
    assert search.shipper().ship_once()
    other = MlflowStore(search.store.tracking_uri, "another experiment")
    moved = Shipper(search.folder, other, search.search_id, "digits")
    assert moved.ship_once()
    assert reconcile(search.folder, other, search.search_id).complete
    assert len(other.runs(search.search_id)) == 2


def test_a_run_removed_for_good_is_made_and_filled_again(search: Search, results_dir: Path) -> None:
    small_search(search)
    shipper = search.shipper()
    assert shipper.ship_once()
    lost = search.run(1).run_id
    with closing(sqlite3.connect(results_dir / "mlflow/mlflow.db")) as database, database:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (lost,))
    database.close()
    search.trial(1).epoch(report(4))
    assert not shipper.ship_once()
    assert "sent again" in shipper.status().last_error
    assert shipper.ship_once()
    check = search.check()
    assert check.complete
    assert check.runs == 3


def test_a_run_in_the_bin_refuses_its_items_and_nothing_else(search: Search) -> None:
    small_search(search)
    shipper = search.shipper()
    assert shipper.ship_once()
    search.store.client().delete_run(search.run(1).run_id)
    for number in (0, 1):
        search.trial(number).epoch(report(4))
        search.trial(number).end(Outcome.COMPLETE, "")
    assert shipper.ship_once()
    status = shipper.status()
    assert (status.refused, status.pending) == (6, 0)
    assert search.run(0).status == "FINISHED"
    assert search.run(1).deleted


def test_an_outbox_that_was_replaced_is_sent_from_its_start(search: Search) -> None:
    small_search(search, trials=1)
    shipper = search.shipper()
    assert shipper.ship_once()
    path = search.folder / OUTBOX_FILE
    size = path.stat().st_size
    path.unlink()
    trial = search.trial(0)
    for epoch in range(1, 40):
        trial.epoch(report(epoch, other=float(epoch)))
    assert path.stat().st_size > size
    again = search.shipper()
    assert again.ship_once()
    assert search.steps(0, "other") == list(range(1, 40))


def test_an_artifact_lands_however_the_results_folder_is_named(
    results_dir: Path, store: MlflowStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own name, a link and a path with ``..``, each made and used by any of the three."""
    link = tmp_path / "link"
    link.symlink_to(results_dir)
    monkeypatch.chdir(tmp_path)
    relative = Path("..", tmp_path.name, "link")
    file = tmp_path / "note.txt"
    file.write_text("kept", encoding="utf-8")
    names = (results_dir, link, relative)
    for index, maker in enumerate(names):
        experiment = f"made as {index}"  # its artifacts' address is stored as the maker names it
        run_id = MlflowStore.embedded(maker, experiment).create_run(
            NewRun(uuid.uuid4().hex, None, "a", 1)
        )
        for user in names:
            used = MlflowStore.embedded(user, experiment)
            used.log_artifact(run_id, file, f"from {names.index(user)}")
        assert len(store.client().list_artifacts(run_id)) == 3


@pytest.mark.parametrize("tail", ["", "/../x", "/%2e%2e/x", "/link/x", "x/y"])
def test_an_artifact_address_outside_is_told_from_one_inside(tail: str, tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    assert is_inside(f"{folder.as_uri()}/7/artifacts", folder)
    assert not is_inside(f"{folder.as_uri()}{tail}", folder)
    assert not is_inside(f"{folder}/7", folder)  # no address
    assert not is_inside(f"ftp://{folder}/7", folder)


def test_a_missing_point_is_found_by_reconciliation(search: Search, results_dir: Path) -> None:
    small_search(search)
    assert search.shipper().ship_once()
    with closing(sqlite3.connect(results_dir / "mlflow/mlflow.db")) as database, database:
        database.execute(
            "DELETE FROM metrics WHERE run_uuid = ? AND key = 'val_loss' AND step = 2",
            (search.run(1).run_id,),
        )
    database.close()
    check = search.check()
    assert not check.complete
    assert (check.recorded - check.stored, check.missing) == (1, (1,))
    (search.folder / PROGRESS_FILE).unlink()
    assert search.shipper().ship_once()
    assert search.check().complete


def test_registering_a_model_makes_a_version_and_moves_the_alias(search: Search) -> None:
    small_search(search, trials=1)
    assert search.shipper().ship_once()
    run_id, client = search.run(0).run_id, search.store.client()
    weights = search.folder / "model.safetensors"
    weights.write_bytes(b"weights")
    name = f"digits {search.search_id}"
    versions = [register_model(search.store, run_id, [weights], name, "champion") for _ in range(2)]
    assert versions == ["1", "2"]
    found = client.get_model_version_by_alias(name, "champion")
    assert (str(found.version), found.run_id) == ("2", run_id)
    assert [f.path for f in client.list_artifacts(run_id, "model")] == ["model/model.safetensors"]
    with pytest.raises(TrackingError, match="topotune sync"):
        register_model(search.store, "0" * 32, [weights], name, "champion")
    with pytest.raises(TrackingError, match="not allowed"):
        register_model(search.store, run_id, [weights], "a/b' OR 1", "champion")
    with pytest.raises(TrackingError):
        register_model(search.store, run_id, [weights], name, "v1")


@pytest.mark.parametrize("delay", [0.0, 0.4])
def test_a_process_killed_while_it_makes_the_database_leaves_nothing_that_blocks(
    delay: float, tmp_path: Path
) -> None:
    code = (
        "import sys, pathlib\n"
        "from topotune.tracking.mlflow import MlflowStore\n"
        "MlflowStore.embedded(pathlib.Path(sys.argv[1])).ping()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    partial = tmp_path / "mlflow" / "mlflow.db.partial"
    deadline = time.monotonic() + 60
    while not partial.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.wait()
    assert not (tmp_path / "mlflow" / "mlflow.db").exists()
    MlflowStore.embedded(tmp_path).ping()
    assert not partial.exists()
