"""A whole search whose results are in an object store: real S3, PostgreSQL, MLflow and Ray; its
driver is killed, its machine's disk is lost, and another machine goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.faults.task import IMPORT_PATH, PAUSE, TRAINED
from tests.object_server import CREDENTIALS, ObjectServer
from tests.postgres import Postgres
from tests.reconcile import reconcile
from topotune.search.place.objects.address import SCRATCH, StoreAddress
from topotune.search.place.objects.store import ObjectStore
from topotune.settings import STUDY_URI, TRACKING_URI
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.serve import serve_dashboard

pytestmark = [
    pytest.mark.timeout(580),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's use of SQLAlchemy
]

ROOT = Path(__file__).parents[2]
EPOCHS = 10


class Cluster:
    """The services, and a machine to run commands on.

    Attributes:
        environment: of its commands.
        scratch: the machine's own folder.
    """

    def __init__(self, place: str, environment: dict[str, str], folder: Path) -> None:
        self.place, self.environment, self._folder = place, environment, folder
        self.store = ObjectStore(StoreAddress.parse(place))
        self.scratch = folder / "machine-1"

    def start(self, *arguments: str | Path) -> tuple[subprocess.Popen[bytes], Path]:
        log = self._folder / f"{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "topotune", *map(str, arguments)]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "--results-dir", self.place],
                cwd=ROOT,
                env={**os.environ, **self.environment, SCRATCH: str(self.scratch)},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        return process, log

    def run(self, *arguments: str | Path, code: int = 0) -> str:
        process, log = self.start(*arguments)
        try:
            found = process.wait(240)
        finally:
            process.kill()
            process.wait()
        text = log.read_text()
        assert found == code, text
        assert "Traceback" not in text
        return text

    def status(self) -> dict[str, Any]:
        text = self.run("status", "far", "--json")
        found: dict[str, Any] = json.loads(text[text.index("{") :])
        return found

    def recorded(self, trial: int) -> list[Any]:
        """The reports of a trial in the store's outbox, with their stamps."""
        lines = (self.store.read("far/outbox.jsonl") or b"").splitlines(keepends=True)
        records = [json.loads(line[18:]) for line in lines if line.endswith(b"\n")]
        found = (record for record in records if record["trial"] == trial)
        return [record["report"] for record in found if record["kind"] == "epoch"]

    def epochs(self, trial: int) -> list[Any]:
        return [report["epoch"] for report in self.recorded(trial)]

    def checkpointed(self, trial: int) -> list[Any]:
        """The reports that a trial's checkpoint in the store holds."""
        content = self.store.read(f"far/trials/{trial:04d}/checkpoint.pt") or b""
        history: list[Any] = json.loads(content.splitlines()[1])["record"]["history"]
        return history


def wait_for(condition: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def below(pid: int) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    return found


def search_file(folder: Path, **changes: Any) -> Path:
    data = {
        "name": "far",
        "task": {"name": IMPORT_PATH, "options": {"pause": 0.6}},
        "method": "topological_adam",
        "space": {"lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}},
        "objective": {"metric": "val_accuracy", "direction": "maximize"},
        "budget": {"trials": 2, "epochs": EPOCHS},
        "pruner": "none",
        "train": {"batch_size": 32},
        "overhead": {"blocks": 0},
        "resources": {"concurrency": 1},
        "keep_checkpoints": 1,
        **changes,
    }
    path = folder / "far.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


@pytest.mark.cluster
def test_another_machine_goes_on_where_a_killed_driver_left_off(tmp_path: Path) -> None:
    served = MlflowStore.embedded(tmp_path / "served")
    with ObjectServer() as server, Postgres() as database, serve_dashboard(served, 0) as mlflow:
        server.bucket("bucket")
        trained = tmp_path / "trained.txt"
        environment = {
            **CREDENTIALS,
            STUDY_URI: database.uri,
            TRACKING_URI: mlflow.url,
            TRAINED: str(trained),
            "OMP_NUM_THREADS": "1",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in CREDENTIALS.items():
                patch.setenv(name, value)
            cluster = Cluster(server.address("bucket/the results"), environment, tmp_path)
            _go_on(cluster, trained)
            _check_mlflow(cluster, MlflowStore(mlflow.url))


def _check_mlflow(cluster: Cluster, stored: MlflowStore) -> None:
    """One run a trial and one for the search, and every recorded point stored once."""
    identity = json.loads(cluster.store.read("far/search.json") or b"")
    runs = Counter(run.trial for run in stored.runs(identity["search_id"]))
    assert runs == Counter([None, 0, 1])
    folder = next(cluster.scratch.glob("stores/*/far"))
    checked = reconcile(folder, stored, identity["search_id"])
    assert checked.complete, checked
    assert checked.recorded > 2 * EPOCHS


def _go_on(cluster: Cluster, trained: Path) -> None:
    file = search_file(trained.parent)
    driver, log = cluster.start("search", file)
    try:
        wait_for(lambda: driver.poll() is not None or len(cluster.epochs(0)) >= 2)
        assert driver.poll() is None, log.read_text()
        working = trained.read_bytes().splitlines()[-1].split()[0]
        os.kill(int(working), signal.SIGKILL)  # a worker, in the middle of an epoch
        first, cluster.scratch = cluster.scratch, trained.parent / "machine-2"
        refused = cluster.run("resume", "far", code=2)
        assert f"driven by pid {driver.pid} on" in refused
        cluster.scratch = first
        assert driver.poll() is None, log.read_text()
        wait_for(lambda: len(cluster.epochs(0)) >= 4)
        left = below(driver.pid)
        before = cluster.recorded(0)
    finally:
        driver.kill()
        driver.wait()
    for process in psutil.wait_procs(left, timeout=20)[1]:
        assert "Trainable" not in process.name()  # no worker outlives its driver
        process.kill()
    kept = cluster.checkpointed(0)  # before the driver hears of an epoch, it is there
    assert kept[: len(before)] == before
    shutil.rmtree(cluster.scratch)

    cluster.scratch = trained.parent / "machine-3"
    board = cluster.status()
    assert board["state"] == "stopped"
    assert board["counts"]["RUNNING"] >= 1
    cluster.environment[PAUSE] = "0.02"
    out = cluster.run("resume", "far")
    assert f"Results: {cluster.store.address.place}/far" in out
    board = cluster.status()
    assert board["state"] == "finished"
    assert {t["number"]: t["state"] for t in board["trials"]} == {0: "COMPLETE", 1: "COMPLETE"}
    for trial in board["trials"]:
        assert cluster.epochs(trial["number"]) == list(range(1, EPOCHS + 1))
        assert len(trial["curve"]) == EPOCHS
    assert cluster.recorded(0)[: len(kept)] == kept
    # Two workers were killed, each in one epoch at most that nobody had heard of.
    assert len(trained.read_bytes().splitlines()) <= 2 * EPOCHS + 2
    assert not list(cluster.scratch.glob("workers/*/*/trials/*"))
    names = set(cluster.store.objects("far"))
    checkpoints = {f"trials/{n:04d}/checkpoint.pt" for n in (0, 1)} & names
    assert checkpoints == {f"trials/{board['best']:04d}/checkpoint.pt"}
    wanted = {"search.json", "study.jsonl", "leaderboard.json", "outbox.jsonl"}
    assert wanted <= names
    assert {f"trials/{n:04d}/trace.npz" for n in (0, 1)} <= names
    assert not [name for name in names if "/trace/" in name]
    assert not [name for name in names if name.endswith((".previous.pt", ".lock", ".partial"))]

    cluster.scratch = trained.parent / "machine-4"
    out = cluster.run("sync", "far", "--timeout", "60")
    assert ", 0 stored" not in out
    exports = trained.parent / "exports"
    out = cluster.run("export", "far", "--verify", "--out", exports)
    assert "trained again; its folder" not in out
    assert (trained.parent / "exports").is_dir()
    assert "lr:" in cluster.run("best", "far")


@pytest.mark.cluster_full
def test_a_stop_while_the_store_is_away_says_what_is_not_saved_and_a_resume_saves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with ObjectServer() as server, Postgres() as database:
        server.bucket("bucket")
        tracking = "http://127.0.0.1:9"  # nobody there: the records wait
        environment = {**CREDENTIALS, STUDY_URI: database.uri, TRACKING_URI: tracking}
        environment["OMP_NUM_THREADS"] = "1"
        cluster = Cluster(server.address("bucket/r"), environment, tmp_path)
        budget = {"trials": 1, "epochs": EPOCHS}
        driver, log = cluster.start("search", search_file(tmp_path, budget=budget))
        try:
            wait_for(lambda: driver.poll() is not None or len(cluster.epochs(0)) >= 1)
            assert driver.poll() is None, log.read_text()
            told = len(cluster.epochs(0))
            server.gate.close()
            driver.send_signal(signal.SIGINT)
            began = time.monotonic()
            code = driver.wait(60)
            # 130 where the machine is too slow for what a stop may take: then as after a kill.
            assert code in (1, 130), log.read_text()
            took = time.monotonic() - began
        finally:
            driver.kill()
            driver.wait()
        text = " ".join(log.read_text().split())
        assert took < 40, text
        assert "Traceback" not in text
        assert f"What is not saved there yet is kept in {cluster.scratch}/stores/" in text
        if code == 1:
            assert "error: search 'far': not all of it is saved in s3://bucket/r?" in text
            assert f"wait in {cluster.scratch}/stores/" in text
            assert "topotune sync far --results-dir 's3://bucket/r?" in text
        server.gate.open()
        assert cluster.status()["counts"]["RUNNING"] == 1
        environment[PAUSE] = "0.02"
        cluster.run("resume", "far")
        board = cluster.status()
        assert board["counts"]["COMPLETE"] == 1
        assert cluster.epochs(0) == list(range(1, EPOCHS + 1))
        assert told >= 1
        assert cluster.store.read("far/leaderboard.json") is not None
