"""The commands of compose.yaml, run for real without Docker: PostgreSQL, MLflow, Ray, one search.

Only addresses, ports and folders differ: every service listens on this machine's loopback.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.cluster_files import CLUSTER, ROOT, compose
from tests.postgres import Postgres, installed, program

pytestmark = [pytest.mark.cluster_full, pytest.mark.timeout(600)]

SEARCH = """
name: rings
task: {name: "tests.user_task:Rings"}
method: adam
space: {lr: {type: float, low: 1.0e-4, high: 1.0e-1, log: true}}
objective: {metric: val_accuracy, direction: maximize}
budget: {trials: 3, epochs: 2}
"""


def free_port() -> int:
    """A port that nobody listens on; above 20000, since Ray's workers take those below."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port > 20000:
            return port


class Site:
    """The services of compose.yaml as processes; ended, newest first, when it is closed."""

    def __init__(self, folder: Path, postgres: Postgres) -> None:
        self.folder, self.postgres = folder, postgres
        self.mlflow, self.ray, self.jobs = free_port(), free_port(), free_port()
        self.stack = ExitStack()
        for name in compose()["secrets"]:
            (folder / name).write_text(secrets.token_hex(32) + "\n", encoding="ascii")
        (folder / "artifacts").mkdir()
        (folder / "storage").mkdir()
        auth = (CLUSTER / "mlflow-auth.ini").read_text(encoding="utf-8")
        (folder / "mlflow-auth.ini").write_text(self.here(auth), encoding="utf-8")

    def here(self, text: str) -> str:
        """A text of compose.yaml with what stands for the containers replaced."""
        changes = {
            "@postgres/": f"@127.0.0.1:{self.postgres.port}/",
            "mlflow:5000": f"127.0.0.1:{self.mlflow}",
            "/run/secrets": str(self.folder),
            "--host=0.0.0.0": "--host=127.0.0.1",
            "--port=5000": f"--port={self.mlflow}",
            "=/artifacts": f"={self.folder}/artifacts",
            "--dashboard-host=0.0.0.0": "--dashboard-host=127.0.0.1",
            "--dashboard-port=8265": f"--dashboard-port={self.jobs}",
            "--port=6379": f"--port={self.ray} --ray-client-server-port={free_port()}",
            "head:6379": f"127.0.0.1:{self.ray}",
            "--object-store-memory=500000000": "--object-store-memory=100000000",
        }
        for old, new in changes.items():
            text = text.replace(old, new)
        return text

    def environment(self, service: str) -> dict[str, str]:
        """What the container of a service would have, and what the image sets."""
        given = compose()["services"][service].get("environment", {})
        return {
            "PATH": f"{CLUSTER}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.folder / "ray"),
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "mlflow-auth.ini"),
            **{name: self.here(str(value)) for name, value in given.items()},
        }

    def command(self, service: str) -> list[str]:
        words = [self.here(word) for word in compose()["services"][service]["command"]]
        return [str(CLUSTER / "entrypoint.sh"), *(part for word in words for part in word.split())]

    def start(self, service: str, *more: str) -> subprocess.Popen[bytes]:
        log = self.stack.enter_context((self.folder / f"{service}.log").open("ab"))
        process = subprocess.Popen(
            [*self.command(service), *more], env=self.environment(service), cwd=self.folder,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        self.stack.callback(end, process)
        return process

    def run(self, service: str, *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """A command in the container of a service."""
        return subprocess.run(
            [CLUSTER / "entrypoint.sh", *command], env={**self.environment(service), **changes},
            cwd=self.folder, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    def secret(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="ascii").strip()

    def log(self, service: str) -> str:
        return (self.folder / f"{service}.log").read_text(encoding="utf-8", errors="replace")[
            -3000:
        ]


def end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answer(url: str, **headers: str) -> int:
    """The status of a request."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=10
        ) as got:
            return int(got.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def wait(url: str, process: subprocess.Popen[bytes], site: Site, service: str) -> None:
    end_at = time.monotonic() + 120
    while answer(url) != 200:
        assert process.poll() is None, site.log(service)
        assert time.monotonic() < end_at, site.log(service)
        time.sleep(0.5)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if not installed() or program("psql") is None:
        pytest.skip("PostgreSQL's server and psql are not installed")
    # Short: the sockets in Ray's folder have a bounded path.
    with TemporaryDirectory(prefix="tt-") as folder, Postgres() as postgres:
        place = Site(Path(folder), postgres)
        with place.stack:
            databases(place)
            server = place.start("mlflow")
            wait(f"http://127.0.0.1:{place.mlflow}/health", server, place, "mlflow")
            yield place


def databases(site: Site) -> None:
    """What PostgreSQL's image does with databases.sh at its first start."""
    bin_folder = Path(str(program("psql"))).parent
    done = site.run(
        "postgres", str(CLUSTER / "kuberay" / "databases.sh"),
        PATH=f"{bin_folder}:{os.environ['PATH']}", PGHOST="127.0.0.1",
        PGPORT=str(site.postgres.port), PGPASSWORD=site.postgres.password, POSTGRES_USER="tester",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("role", "password", "database", "enters"),
    [
        ("topotune", "study_db_password", "topotune", True),
        ("mlflow", "mlflow_db_password", "mlflow", True),
        ("topotune", "study_db_password", "mlflow", False),
        ("mlflow", "mlflow_db_password", "topotune", False),
        ("topotune", "mlflow_db_password", "topotune", False),
    ],
)
def test_each_role_enters_its_own_database_only(
    site: Site, role: str, password: str, database: str, enters: bool
) -> None:
    done = subprocess.run(
        [str(program("psql")), "-h", "127.0.0.1", "-p", str(site.postgres.port), "-U", role,
         "-d", database, "-Atc", "select rolsuper from pg_roles where rolname = current_user"],
        env={"PGPASSWORD": site.secret(password)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode == 0) == enters, done.stderr
    assert done.stdout.strip() == ("f" if enters else "")


def test_mlflow_wants_an_account_and_makes_the_drivers(site: Site) -> None:
    base = f"http://127.0.0.1:{site.mlflow}"
    search = f"{base}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"

    def as_user(name: str, secret: str) -> int:
        login = b64encode(f"{name}:{site.secret(secret)}".encode()).decode()
        return answer(search, Authorization=f"Basic {login}")

    assert answer(search) == 401
    assert as_user("topotune", "mlflow_password") == 401
    assert as_user("admin", "mlflow_password") == 401
    assert answer(f"{base}/health") == 200
    assert answer(search, Host="evil.example.com") == 403
    for said in ("created", "was there"):  # twice, as after `down` and `up`
        done = site.run("account", "mlflow-account.sh")
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    assert as_user("topotune", "mlflow_password") == 200
    assert as_user("admin", "mlflow_admin_password") == 200


def test_a_search_on_the_whole_of_it(site: Site) -> None:
    head = site.start("head")
    agent = f"http://127.0.0.1:{site.jobs}/api/gcs_healthz"
    wait(agent, head, site, "head")
    worker = site.start("worker", "--dashboard-agent-listen-port=0")
    address = f"127.0.0.1:{site.ray}"
    end_at = time.monotonic() + 120
    while site.run("head", "ray", "status", "--address", address).stdout.count(" node_") < 2:
        assert worker.poll() is None, site.log("worker")
        assert time.monotonic() < end_at, site.log("worker")

    jobs = f"http://127.0.0.1:{site.jobs}/api/jobs/"
    assert answer(jobs) == 401
    assert answer(jobs, Authorization="Bearer of-nothing") == 403
    assert answer(jobs, Authorization=f"Bearer {site.secret('ray_token')}") == 200
    other = str(site.folder / "mlflow_secret_key")
    refused = site.run("head", "ray", "status", "--address", address, RAY_AUTH_TOKEN_PATH=other)
    assert refused.returncode != 0

    (site.folder / "rings.yaml").write_text(SEARCH, encoding="utf-8")
    storage = str(site.folder / "storage")
    done = site.run(
        "head", "topotune", "search", "rings.yaml", "--results-dir", storage,
        "--ray-address", address, "--json", PYTHONPATH=f"{ROOT}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + site.log("head")

    # Recorded: the study in PostgreSQL, the runs in MLflow, by the driver's own account.
    count = subprocess.run(
        [str(program("psql")), "-h", "127.0.0.1", "-p", str(site.postgres.port), "-U", "topotune",
         "-d", "topotune", "-Atc", "select count(*) from trials where state = 'COMPLETE'"],
        env={"PGPASSWORD": site.secret("study_db_password")}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert int(count.stdout) >= 1
    script = (
        "import json, mlflow; client = mlflow.MlflowClient();"
        "ids = [e.experiment_id for e in client.search_experiments()];"
        "runs = client.search_runs(ids); print(json.dumps([len(runs),"
        " sum(len(client.list_artifacts(r.info.run_id)) for r in runs)]))"
    )
    found = site.run("head", "python", "-W", "ignore", "-c", script)
    runs, artifacts = json.loads(found.stdout.splitlines()[-1])
    assert runs >= 4  # the search and its trials
    assert artifacts
    # By way of the server, which alone knows the folder.
    assert [path for path in (site.folder / "artifacts").rglob("*") if path.is_file()]
    for path in Path(storage).rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for name in compose()["secrets"]:
                assert site.secret(name).encode() not in content, path
    assert not re.search("password", site.log("worker"), re.I)
