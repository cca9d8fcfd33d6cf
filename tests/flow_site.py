"""A cluster by cluster/one-machine.sh and clients of it, for the tests: real processes all."""

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
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from tests.cluster.test_run import free_port
from tests.cluster_files import CLUSTER, ROOT
from topotune.bench.scaling.processes import marked
from topotune.records import Outcome
from topotune.tracking.entries import Epoch
from topotune.tracking.outbox import bodies_of

SEARCH = """
name: {name}
task: {{name: "paced_rings:Paced", options: {{pause: {pause}, hurry: "{hurry}"}}}}
method: adam
space: {{lr: {{type: float, low: 1.0e-4, high: 1.0e-1, log: true}}}}
objective: {{metric: val_accuracy, direction: maximize}}
pruner: none
train: {{batch_size: 64}}
overhead: {{blocks: 0}}
budget: {{trials: {trials}, epochs: {epochs}}}
"""
BATCHES = 13
"""Of an epoch at most: 800 points, 64 each."""


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What a condition returns once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} not within {seconds:g} s"
        time.sleep(0.5)
    return found


class Client:
    """Somebody's own folder, home and environment; every command is a process of its own.

    Args:
        folder: made here, with a task of the user's own in it.
        environment: what it knows of the cluster.
        user: its name.
    """

    def __init__(self, folder: Path, environment: dict[str, str], user: str) -> None:
        self.folder, self.user = folder, user
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder / "home"),
            "TOPOTUNE_USER": user,
            **environment,
        }
        (folder / "home").mkdir(parents=True)
        # Two modules, one of which imports the other; no node has them.
        tests = ROOT / "tests"
        shutil.copy(tests / "user_task.py", folder / "plain_rings.py")
        paced = (tests / "flow_task.py").read_text(encoding="utf-8")
        (folder / "paced_rings.py").write_text(paced.replace("tests.user_task", "plain_rings"))

    def search(
        self, name: str, trials: int, epochs: int, seconds: float, hurry: Path | str = ""
    ) -> str:
        """Write a search file, whose epochs take so many seconds until there is a file ``hurry``;
        its name."""
        pause = round(seconds / BATCHES, 4)
        text = SEARCH.format(name=name, trials=trials, epochs=epochs, pause=pause, hurry=hurry)
        (self.folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        return f"{name}.yaml"

    def start(self, *words: str, **changes: str) -> subprocess.Popen[str]:
        """A command that runs beside the test."""
        return subprocess.Popen(
            ["topotune", *words], env={**self.environment, **changes}, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def fails(self, *words: str, **changes: str) -> tuple[int, str]:
        """Exit code and the one line of a command that must not go well."""
        environment = {**self.environment, **changes}
        done = subprocess.run(
            ["topotune", *words],
            env={name: value for name, value in environment.items() if value},
            cwd=self.folder, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode, done.stdout
        assert "Traceback" not in done.stderr, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.stderr
        return done.returncode, lines[0]

    def run(self, *words: str) -> str:
        """What a command prints, which must go well."""
        done = subprocess.run(
            ["topotune", *words], env=self.environment, cwd=self.folder, capture_output=True,
            text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stderr[-3000:]}"
        return done.stdout

    def list(self) -> dict[str, dict[str, Any]]:
        """All searches, by name."""
        return {row["name"]: row for row in json.loads(self.run("list", "--json"))}

    def status(self, name: str) -> dict[str, Any]:
        """How one search stands."""
        found: dict[str, Any] = json.loads(self.run("status", name, "--json"))
        return found


def finish(process: subprocess.Popen[str], seconds: float = 240.0) -> str:
    """The output of a command that ran beside the test, which must go well."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"it still ran: {output[-3000:]}") from None
    assert process.returncode == 0, output[-3000:]
    return output


def audit(results: Path, status: dict[str, Any], trials: int, epochs: int) -> None:
    """Every trial of the budget has ended well, each of its epochs is recorded once."""
    name = status["search"]
    assert status["state"] == "finished", status["counts"]
    numbers = sorted(row["number"] for row in status["trials"])
    assert numbers == list(range(trials))
    for row in status["trials"]:
        place = f"{name}, trial {row['number']}: {row['reason']}"
        assert row["state"] in (Outcome.COMPLETE, Outcome.PRUNED), place
        assert row["state"] == Outcome.PRUNED or row["epochs"] == epochs, place
        assert epochs_of(results / name, row["number"]) == list(range(1, row["epochs"] + 1)), place
    counted = Counter(row["state"] for row in status["trials"])
    assert counted == {state: count for state, count in status["counts"].items() if count}


def epochs_of(search: Path, trial: int) -> list[int]:
    """The epochs that a trial has recorded, in the order that they were written."""
    bodies = bodies_of(search, trial)
    return [body.report.epoch for body in bodies if isinstance(body, Epoch)]


class OneMachine:
    """The cluster of one-machine.sh on free ports, with two nodes of two slots each."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "cluster"
        self.jobs, self.postgres, self.ray = free_port(), free_port(), free_port()
        self.token = ""
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "TOPOTUNE_CLUSTER": str(self.root),
            "TOPOTUNE_WORKER_CPUS": "2",
            "JOBS_PORT": str(self.jobs),
            "MLFLOW_PORT": str(free_port()),
            "POSTGRES_PORT": str(self.postgres),
            "RAY_PORT": str(self.ray),
            "RAY_CLIENT_PORT": str(free_port()),
            "AGENT_PORT": str(min(free_port(), 65000)),
            "NODE_NETWORK": f"127.0.{os.getpid() % 200 + 20}",
        }

    @property
    def results(self) -> Path:
        """Where searches lie."""
        return self.root / "results"

    @property
    def access(self) -> dict[str, str]:
        """What a client must know."""
        return {
            "TOPOTUNE_ADDRESS": f"http://127.0.0.1:{self.jobs}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
        }

    def __enter__(self) -> Self:
        try:
            self.script("up")
        except BaseException:
            self.__exit__()
            raise
        self.token = (self.root / "secrets" / "ray_token").read_text(encoding="ascii")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Exception):  # what is left is ended below
            self.script("down")
        for name in ("worker-1", "worker-2", "head", "mlflow"):
            self._end(name)
        if os.geteuid() == 0:
            data = Path(f"/var/lib/postgresql/topotune-{self.postgres}")
            with suppress(OSError, ValueError, psutil.Error):
                server = psutil.Process(int((data / "data/postmaster.pid").read_text().split()[0]))
                server.send_signal(signal.SIGQUIT)
                server.wait(30)
            shutil.rmtree(data, ignore_errors=True)

    def _end(self, part: str) -> None:
        for process in marked("TOPOTUNE_CLUSTER_PART", str(self.root / part)):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def script(self, verb: str) -> str:
        """Run the script; what it printed."""
        done = subprocess.run(
            [str(CLUSTER / "one-machine.sh"), verb], env=self.environment,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def kill(self, part: str) -> None:
        """Kill -9 a node, as a machine does that loses power."""
        leader = int((self.root / "run" / part).read_text(encoding="ascii"))
        os.killpg(leader, signal.SIGKILL)
        self._end(part)  # its workers, which Ray puts into groups of their own
        until(lambda: f"{part} does not run" in self.script("status"), 30, f"{part} is gone")
