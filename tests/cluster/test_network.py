"""A cluster whose nodes have a network of their own each, and one that loses its link."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from tests.cluster.test_run import answer, end, free_port
from tests.cluster_files import ROOT
from tests.flow_site import Client, audit, epochs_of, until
from tests.postgres import Postgres, installed

pytestmark = [pytest.mark.cluster_full, pytest.mark.timeout(600)]

TRIALS, EPOCHS, SECONDS = 3, 6, 4.0
HEAD, WORKERS = 2, (3, 4)
"""Last numbers of the nodes' addresses; the machine itself, which has the stores, is 1."""


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    """Run ``ip``, whatever it answers."""
    return subprocess.run(["ip", *words], capture_output=True, text=True)


class Network:
    """A bridge of this machine, and namespaces with a link to it; all of it goes at the end.

    Attributes:
        prefix: first three numbers of the addresses.
    """

    def __init__(self) -> None:
        mark = secrets.token_hex(3)
        taken = ip("-o", "-4", "address").stdout
        self.prefix = next(f"10.99.{n}" for n in range(17, 250) if f"10.99.{n}." not in taken)
        self._name, self._stack = f"tt{mark}", ExitStack()

    def __enter__(self) -> Network:
        made = self._made(
            ("link", "add", self._name, "type", "bridge"), ("link", "del", self._name)
        )
        if not made:
            self._stack.close()
            pytest.skip("bridges and network namespaces need root, and a machine that allows them")
        self._do("address", "add", f"{self.prefix}.1/24", "dev", self._name)
        self._do("link", "set", self._name, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _made(self, make: tuple[str, ...], unmake: tuple[str, ...]) -> bool:
        if os.geteuid() != 0 or shutil.which("ip") is None or ip(*make).returncode:
            return False
        self._stack.callback(ip, *unmake)
        return True

    def _do(self, *words: str) -> None:
        done = ip(*words)
        assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"

    def add(self, number: int) -> None:
        """A namespace with this address, and nothing else in it."""
        space, link = self._space(number), self._link(number)
        if not self._made(("netns", "add", space), ("netns", "del", space)):
            self._stack.close()
            pytest.skip("network namespaces cannot be made here")
        self._stack.callback(self.end, number)
        self._do("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        # By itself it goes once the kernel has given up the last connection in there.
        self._stack.callback(ip, "link", "del", link)
        self._do("link", "set", link, "master", self._name, "up")
        address = f"{self.prefix}.{number}/24"
        self._do("-n", space, "address", "add", address, "dev", "eth0")
        self._do("-n", space, "link", "set", "eth0", "up")
        self._do("-n", space, "link", "set", "lo", "up")

    def cut(self, number: int) -> None:
        """Take the link of a namespace down."""
        self._do("link", "set", self._link(number), "down")

    def end(self, number: int) -> None:
        """Kill all processes in a namespace: those of a node without a link end late by
        themselves."""
        for pid in ip("netns", "pids", self._space(number)).stdout.split():
            with suppress(psutil.NoSuchProcess):
                psutil.Process(int(pid)).kill()

    def inside(self, number: int) -> list[str]:
        """What stands before a command that runs in a namespace."""
        return ["ip", "netns", "exec", self._space(number)]

    def _space(self, number: int) -> str:
        return f"{self._name}-{number}"

    def _link(self, number: int) -> str:
        return f"{self._name}v{number}"


class Site:
    """PostgreSQL and MLflow on this machine's side of the network, and Ray on the nodes."""

    def __init__(self, folder: Path, network: Network, stack: ExitStack) -> None:
        self.folder, self.network, self.stack = folder, network, stack
        self.postgres = stack.enter_context(Postgres(f"{network.prefix}.1"))
        self.token = secrets.token_hex(32)
        self.results = folder / "results"
        self.results.mkdir()
        self.tracking = f"http://{network.prefix}.1:{free_port()}"

    @property
    def address(self) -> str:
        """Of the Jobs API."""
        return f"http://{self.network.prefix}.{HEAD}:8265"

    def start(self, name: str, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        """A process that ends with the site."""
        log = self.stack.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True,
            env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                 "PYTHONPATH": str(ROOT), "HOME": str(self.folder), "OMP_NUM_THREADS": "1",
                 **environment},
        )  # fmt: skip
        self.stack.callback(end, process)
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def serve_mlflow(self) -> None:
        host, port = self.tracking.removeprefix("http://").split(":")
        self.start(
            "mlflow",
            ["mlflow", "server", f"--host={host}", f"--port={port}", "--workers=1",
             f"--backend-store-uri=sqlite:///{self.folder}/mlflow.db", "--serve-artifacts",
             f"--artifacts-destination={self.folder}/artifacts", f"--allowed-hosts={host}:*"],
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        )  # fmt: skip
        until(lambda: answer(f"{self.tracking}/health") == 200, 120, "MLflow answers")

    def start_node(self, number: int, *arguments: str, **environment: str) -> None:
        """Ray in a namespace of its own."""
        self.network.add(number)
        self.start(
            f"node-{number}",
            [*self.network.inside(number), "ray", "start", "--block", "--disable-usage-stats",
             f"--node-ip-address={self.network.prefix}.{number}",
             f"--temp-dir={self.folder}/r{number}", *arguments],
            RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=self.token, TOPOTUNE_STORAGE=str(self.results),
            **environment,
        )  # fmt: skip
        self.stack.callback(self.network.end, number)
        started = f"node {number} is up"
        until(lambda: "block forever" in self.log(f"node-{number}"), 120, started)

    def start_ray(self) -> None:
        # Half the time that Ray gives a silent node by default, which is half a minute.
        self.start_node(
            HEAD, "--head", "--port=6379", "--num-cpus=0", "--dashboard-host=0.0.0.0",
            TOPOTUNE_STUDY_URI=self.postgres.uri, MLFLOW_TRACKING_URI=self.tracking,
            RAY_health_check_failure_threshold="2",
        )  # fmt: skip
        for number in WORKERS:
            self.start_node(number, f"--address={self.network.prefix}.{HEAD}:6379", "--num-cpus=1")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if not installed():
        pytest.skip("PostgreSQL's server (initdb, postgres) is not installed")
    with (
        TemporaryDirectory(prefix="tt-", ignore_cleanup_errors=True) as folder,
        Network() as network,
        ExitStack() as stack,
    ):
        place = Site(Path(folder), network, stack)
        place.serve_mlflow()
        place.start_ray()
        yield place


@pytest.fixture
def client(site: Site, tmp_path: Path) -> Client:
    access = {
        "TOPOTUNE_ADDRESS": site.address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": site.token,
    }
    return Client(tmp_path / "user", access, "user")


def test_without_a_database_and_a_server_several_machines_are_refused(client: Client) -> None:
    file = client.search("stored-nowhere", 1, 1, 0.1)
    empty = client.folder / "empty.env"
    for name in ("TOPOTUNE_STUDY_URI", "MLFLOW_TRACKING_URI"):
        empty.write_text(f"{name}=\n", encoding="ascii")
        code, line = client.fails("submit", file, "--env-file", str(empty))
        assert code == 2
        assert name in line
        assert "SQLite" in line
        assert "3 machines" in line


def test_a_cut_link_costs_no_trial(site: Site, client: Client) -> None:
    said = client.run(
        "submit", client.search("cut", TRIALS, EPOCHS, SECONDS, site.folder / "hurry")
    )
    assert "begun" in said
    search = site.results / "cut"

    def recorded(trial: int) -> int:
        return len(epochs_of(search, trial))

    until(lambda: recorded(0) >= 1 and recorded(1) >= 1, 120, "both nodes have trained")
    site.network.cut(WORKERS[1])
    assert recorded(0) < EPOCHS, "too late to cut it"
    moved = "goes on from its last epoch"
    until(lambda: moved in client.run("logs", "cut"), 180, "its trial has moved")
    (site.folder / "hurry").touch()
    until(lambda: client.list()["cut"]["job_status"] != "RUNNING", 180, "it has ended")
    logs = client.run("logs", "cut")
    assert client.list()["cut"]["job_status"] == "SUCCEEDED", logs[-3000:]
    audit(site.results, client.status("cut"), TRIALS, EPOCHS)
    counted = client.run("sync", "cut").split()
    assert counted[counted.index("items") - 1] == counted[counted.index("stored") - 1], counted
    for path in search.rglob("*"):
        if path.is_file():
            assert site.postgres.password.encode() not in path.read_bytes(), path
    assert site.postgres.password not in logs
