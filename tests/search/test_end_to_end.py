"""Whole searches through the command line, a real Ray and a real MLflow store, with real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.reconcile import reconcile
from topotune.search.place.folder import SearchFolder
from topotune.tracking.entries import Epoch
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.outbox import bodies_of
from topotune.tracking.shipper import Shipper
from topotune.train.trial import TIMING_METRICS

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's use of SQLAlchemy
]

ROOT = Path(__file__).parents[2]


def search_file(tmp_path: Path, **changes: Any) -> Path:
    data = {
        "name": "rings",
        "task": {"name": "tests.paced_task:Paced", "options": {}},
        "method": "topological_adam",
        "space": {
            "lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
            "coupling": {"type": "categorical", "choices": ["uniform", "exchange", "local"]},
        },
        "objective": {"metric": "val_accuracy", "direction": "maximize"},
        "budget": {"trials": 4, "epochs": 3},
        "overhead": {"blocks": 1, "steps": 1, "warmup": 0},
        "resources": {"concurrency": 1},
    }
    path = tmp_path / "rings.yaml"
    path.write_text(yaml.safe_dump({**data, **changes}, sort_keys=False))
    return path


def start(*arguments: str | Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "topotune", *map(str, arguments)],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def run(*arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "topotune", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def run_error(*arguments: str | Path) -> str:
    """Standard error of a command that must be refused: exit code 2, one line, no traceback.

    Which code an import path runs may stand above.
    """
    done = subprocess.run(
        [sys.executable, "-m", "topotune", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    *notes, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert all(note.startswith("note runs code of ") for note in notes)
    return done.stderr


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def status(results: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("status", "rings", "--json", "--results-dir", results))
    return found


def recorded_epochs(results: Path, trial: int) -> list[int]:
    bodies = bodies_of(results / "rings", trial)
    return [body.report.epoch for body in bodies if isinstance(body, Epoch)]


def untimed(trial: dict[str, Any]) -> dict[str, Any]:
    """A row without what depends on the clock."""
    kept = {k: v for k, v in trial.items() if k not in ("device_seconds", "rank")}
    kept["metrics"] = {
        name: value
        for name, value in trial["metrics"].items()
        if name not in TIMING_METRICS and "overhead" not in name and name != "adam_step_ms"
    }
    return kept


def check_mlflow(results: Path, trials: int) -> None:
    """One run a trial and one for the search, and every recorded point stored once."""
    folder = SearchFolder.open(results, "rings")
    store = MlflowStore.embedded(results)
    found = store.runs(folder.search_id)
    assert Counter(run.trial for run in found) == Counter([None, *range(trials)])
    for run in found:
        load = "system/cpu_utilization_percentage"
        assert run.trial is None or 0 <= run.latest[load] <= 100
    shipper = Shipper(folder.root, store, folder.search_id, "rings")
    count = shipper.close(30)
    assert count.complete, count
    checked = reconcile(folder.root, store, folder.search_id)
    assert checked.complete, checked
    assert checked.recorded > 10 * trials


def test_the_same_seed_twice_export_extend_and_a_foreign_folder(tmp_path: Path) -> None:
    file = search_file(tmp_path)
    boards = []
    for name in ("a", "b"):
        out = run("search", file, "--results-dir", tmp_path / name)
        assert "topotune export rings" in out
        boards.append(status(tmp_path / name))
    for board in boards:
        assert board["state"] == "finished"
        assert sum(board["counts"].values()) == 4
    first, second = ([untimed(t) for t in b["trials"]] for b in boards)
    assert first == second
    check_mlflow(tmp_path / "a", 4)
    again = run("resume", "rings", "--results-dir", tmp_path / "a")
    assert again.startswith("rings: finished, nothing is left to do\n")  # no Ray is started
    assert "topotune export rings" in again
    assert [untimed(t) for t in status(tmp_path / "a")["trials"]] == first
    check_mlflow(tmp_path / "a", 4)

    exports = tmp_path / "exports"
    out = run(
        *("export", "rings", "--top", "2", "--verify", "--out", exports),
        *("--results-dir", tmp_path / "a", "--json"),
    )
    exported = json.loads(out)
    for one in exported:
        assert one["verified"]
        assert 0 < one["test"]["test_accuracy"] <= 1
    first_folder = Path(exported[0]["folder"])
    trained = json.loads(run("train", first_folder / "config.yaml", "--json"))
    recorded = json.loads((first_folder / "metrics.json").read_text())
    assert trained["metrics"]["val_accuracy"] == recorded["metrics"]["val_accuracy"]
    assert trained["test"] == exported[0]["test"]

    run("search", file, "--results-dir", tmp_path / "a", code=2)
    out = run("extend", "rings", "--trials", "2", "--results-dir", tmp_path / "a", "--json")
    board = json.loads(out)
    assert sorted(t["number"] for t in board["trials"]) == list(range(6))
    assert board["finished"]
    check_mlflow(tmp_path / "a", 6)


def test_kill_9_of_the_driver_then_resume(tmp_path: Path) -> None:
    options = {"pause": 0.05}
    file = search_file(
        tmp_path,
        task={"name": "tests.paced_task:Paced", "options": options},
        resources={"concurrency": 2},
    )
    results = tmp_path / "results"
    driver = start("search", file, "--results-dir", results, log=tmp_path / "log")
    # Of any trial: their workers start together, and the one that is behind may be pruned at once.
    wait_for(lambda: max(len(recorded_epochs(results, n)) for n in range(4)) >= 2)
    driver.kill()
    driver.wait()
    before = {n: recorded_epochs(results, n) for n in range(4)}
    killed = status(results)
    assert killed["state"] == "stopped"
    assert killed["counts"]["RUNNING"] >= 1

    run("resume", "rings", "--results-dir", results)
    board = status(results)
    assert board["state"] == "finished"
    assert sorted(t["number"] for t in board["trials"]) == [0, 1, 2, 3]
    assert {t["state"] for t in board["trials"]} <= {"COMPLETE", "PRUNED"}
    for trial in board["trials"]:
        epochs = recorded_epochs(results, trial["number"])
        assert epochs == list(range(1, trial["epochs"] + 1))  # each once, none left out
        assert epochs[: len(before[trial["number"]])] == before[trial["number"]]
        assert len(trial["curve"]) == trial["epochs"]
    check_mlflow(results, 4)


def test_ctrl_c_drains_a_dead_worker_is_retried_and_a_second_driver_is_refused(
    tmp_path: Path,
) -> None:
    file = search_file(
        tmp_path,
        # At a pace that leaves the first one busy while the second one is refused.
        task={"name": "tests.paced_task:Paced", "options": {"pause": 0.1}},
        budget={"trials": 2, "epochs": 6},
        pruner="none",
    )
    results, log = tmp_path / "results", tmp_path / "log"
    driver = start("search", file, "--results-dir", results, log=log)
    wait_for(lambda: len(recorded_epochs(results, 0)) >= 1)
    refused = subprocess.run(
        [sys.executable, "-m", "topotune", "resume", "rings", "--results-dir", str(results)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert f"pid {driver.pid} on" in refused.stderr

    workers = [int(pid) for pid in pids_of_actors(driver.pid)]
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(recorded_epochs(results, 0)) >= 3)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(60) == 130, log.read_text()
    assert "topotune resume rings" in log.read_text()
    assert status(results)["counts"]["RUNNING"] == 1

    run("resume", "rings", "--results-dir", results)
    board = status(results)
    assert {t["state"] for t in board["trials"]} == {"COMPLETE"}
    for trial in board["trials"]:
        assert recorded_epochs(results, trial["number"]) == [1, 2, 3, 4, 5, 6]
    check_mlflow(results, 2)


def pids_of_actors(driver: int) -> list[str]:
    """Processes below ``driver`` that run our actor."""
    import psutil

    children = psutil.Process(driver).children(recursive=True)
    titles = {p.pid: " ".join(p.cmdline()) for p in children}
    return [str(pid) for pid, t in titles.items() if t.startswith("ray::") and "Trainable" in t]


@pytest.mark.parametrize(
    ("fault", "state", "word"),
    [("raise", "FAILED", "the user's loss is broken"), ("nan", "DIVERGED", "loss")],
)
def test_a_broken_loss_ends_every_trial_with_its_cause_and_the_search_goes_on(
    fault: str, state: str, word: str, tmp_path: Path
) -> None:
    space = {
        "lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
        "task.fault": {"type": "categorical", "choices": ["", fault]},
    }
    always = {"name": "tests.paced_task:Paced", "options": {"fault": "raise"}}
    if fault == "raise":  # what fails for every trial is found before any is started
        refused = run_error("search", search_file(tmp_path, task=always))
        assert "RuntimeError: the user's loss is broken" in refused
    file = search_file(
        tmp_path,
        space=space,
        warm_start=[{"lr": 0.01, "task.fault": ""}, {"lr": 0.01, "task.fault": fault}],
        budget={"trials": 3, "epochs": 2},
    )
    results = tmp_path / "results"
    run("search", file, "--results-dir", results)
    board = status(results)
    rows = {t["number"]: t for t in board["trials"]}
    assert rows[0]["state"] == "COMPLETE"
    assert rows[1]["state"] == state
    assert word in rows[1]["reason"]
    assert board["best"] in (0, 2)
    assert board["state"] == "finished"
    runs = MlflowStore.embedded(results).runs(SearchFolder.open(results, "rings").search_id)
    tags = {run.trial: run.tags for run in runs}
    assert tags[1]["topotune.outcome"] == state
    assert word in tags[1]["topotune.reason"]
