"""cluster/README.md's walk-through "On one machine": every command of it, in order, for real.

Each line runs in a shell of its own, as after closing the terminal; only ports and folders differ.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from tests.cluster_files import CLUSTER, ROOT
from tests.postgres import installed
from topotune.records import Outcome

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not installed(), reason="PostgreSQL's server is not installed"),
]
SECTION = (CLUSTER / "README.md").read_text(encoding="utf-8").partition("## On one machine")[2]
LINES = [
    line
    for block in re.findall(r"```console\n(.*?)```", SECTION.partition("\n## ")[0], re.DOTALL)
    for line in block.splitlines()
]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, above those that Ray's workers take."""
    sockets = [socket.socket() for _ in range(4 * count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [port for one in sockets if (port := one.getsockname()[1]) > 20000]
    for one in sockets:
        one.close()
    return ports[:count]


class Machine:
    """A new user's terminal, with a home folder and ports of its own."""

    def __init__(self, home: Path) -> None:
        self.home, self.folder = home, home / "topotune-cluster"
        names = ("JOBS_PORT", "MLFLOW_PORT", "POSTGRES_PORT", "RAY_PORT", "RAY_CLIENT_PORT")
        self.ports = dict(zip((*names, "AGENT_PORT"), map(str, free_ports(6)), strict=True))

    def shell(self, line: str, code: int = 0, cwd: Path = ROOT, seconds: float = 300) -> str:
        """Run one line as a terminal would that was just opened; what it prints."""
        if ".env" in line or line.startswith("source"):
            return ""  # of every terminal, as below
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **self.ports,
        }
        client = self.folder / "client.env"
        script = f"set -eu; if [ -f {client} ]; then source {client}; fi; {line}"
        done = subprocess.run(
            ["bash", "-c", script], env=environment, cwd=cwd, capture_output=True, text=True,
            timeout=seconds,
        )  # fmt: skip
        assert done.returncode == code, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def json(self, line: str) -> dict[str, object]:
        """What a line prints as JSON."""
        data: dict[str, object] = json.loads(self.shell(f"{line} --json"))
        return data

    def password(self) -> str:
        return (self.folder / "secrets" / "mlflow_password").read_text(encoding="ascii")


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with TemporaryDirectory(prefix="home-") as home:
        one = Machine(Path(home))
        try:
            yield one
        finally:
            one.shell("cluster/one-machine.sh down")
            shutil.rmtree(
                f"/var/lib/postgresql/topotune-{one.ports['POSTGRES_PORT']}", ignore_errors=True
            )


@pytest.mark.cluster
def test_the_walk_through(machine: Machine) -> None:
    assert len(LINES) == 17, LINES
    said = {}
    for line in LINES:
        said[line] = machine.shell(line)
        if line.endswith("status topological_adam_mnist5k"):
            machine.shell("topotune logs topological_adam_mnist5k -f")  # let it end
        if line.startswith("topotune extend"):
            machine.shell("topotune logs adam_mnist5k -f")
        if line.startswith("topotune dashboard"):
            _see_the_run(machine, said[line])
    assert "STOPPED" in said["topotune stop adam_mnist5k"]
    assert "BROKEN" not in said["topotune doctor"]
    assert said["topotune doctor"].count("storage") == 4  # the driver, the head, two workers
    export = machine.home / "out"
    machine.shell("cluster/one-machine.sh up")  # down is the last line; all is still there
    for name, trials in (("topological_adam_mnist5k", 8), ("adam_mnist5k", 42)):
        status = machine.json(f"topotune status {name}")
        rows = status["trials"]
        assert isinstance(rows, list)
        assert status["state"] == "finished"
        assert len(rows) == trials
        assert {row["state"] for row in rows} <= {Outcome.COMPLETE, Outcome.PRUNED}
        assert "0 wait" not in machine.shell(f"topotune sync {name}")
        machine.shell(f"topotune export {name} --out {export / name}")
        assert list(export.glob(f"{name}/*/config.yaml"))
    shutil.rmtree(ROOT / "topotune-exports" / "topological_adam_mnist5k")


def _see_the_run(machine: Machine, said: str) -> None:
    """The page that ``dashboard`` names is a run that MLflow's server has."""
    found = re.search(r"topological_adam_mnist5k: (\S+)/#/experiments/\d+/runs/(\w+)", said)
    assert found is not None, said
    request = urllib.request.Request(
        f"{found[1]}/api/2.0/mlflow/runs/get?run_id={found[2]}",
        headers={
            "Authorization": "Basic "
            + b64encode(f"topotune:{machine.password()}".encode()).decode()
        },
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        tags = {tag["key"]: tag["value"] for tag in json.load(answer)["run"]["data"]["tags"]}
    assert tags["topotune.outcome"] == "COMPLETE"
    assert "leaderboard" in tags["mlflow.note.content"].lower()


@pytest.mark.cluster_full
def test_the_same_suggestions_as_on_a_laptop(machine: Machine, tmp_path: Path) -> None:
    """At concurrency 1 the cluster proposes, prunes and finds what the embedded defaults do."""
    machine.shell("cluster/one-machine.sh up")
    text = (ROOT / "search_spaces" / "topological_adam_digits.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    data |= {"name": "same", "budget": {"trials": 14, "epochs": 3}, "overhead": {"blocks": 0}}
    data["resources"] = {"concurrency": 1}
    file = tmp_path / "same.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    machine.shell(f"topotune submit {file}")
    machine.shell("topotune logs same -f")
    there = machine.json("topotune status same")
    machine.shell(f"topotune search {file} --results-dir {tmp_path}/here", seconds=600)
    here = machine.json(f"topotune status same --results-dir {tmp_path}/here")

    def told(status: dict[str, object]) -> dict[int, object]:
        rows = status["trials"]
        assert isinstance(rows, list)
        return {row["number"]: (row["params"], row["state"], row["values"]) for row in rows}

    assert len(told(here)) == 14
    assert told(there) == told(here)


@pytest.mark.cluster_full
def test_a_search_that_comes_later_gets_its_share(machine: Machine, tmp_path: Path) -> None:
    """Two workers, both held by a search of long trials: one is handed over after an epoch."""
    machine.shell("cluster/one-machine.sh up")
    text = (ROOT / "search_spaces" / "topological_adam_digits.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    data |= {"budget": {"trials": 6, "epochs": 5000}, "overhead": {"blocks": 0}, "pruner": "none"}

    def epochs(name: str) -> int:
        rows = machine.json(f"topotune status {name}")["trials"]
        assert isinstance(rows, list)
        return sum(row["epochs"] for row in rows)

    def wait(condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 180
        while not condition():
            assert time.monotonic() < end, what

    for name in ("early", "late"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**data, "name": name}), "utf-8")
    machine.shell(f"topotune submit {tmp_path}/early.yaml")

    def both_slots() -> bool:
        live = machine.json("topotune status early")["live"]
        return isinstance(live, dict) and len(live["running"]) == 2

    wait(both_slots, "the first search has not taken both workers")
    machine.shell(f"topotune submit {tmp_path}/late.yaml")
    wait(lambda: epochs("late") > 1, "the second search never trains")
    before = epochs("early")
    wait(lambda: epochs("early") > before, "the first one does not go on beside it")
    assert "shares the cluster with late: 1 at once" in machine.shell("topotune logs early")
    stopped = machine.shell("topotune stop --all")
    assert "early: STOPPED" in stopped
    assert "late: STOPPED" in stopped
