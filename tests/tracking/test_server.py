"""Shipping over HTTP: outages, every kind of answer, and the dashboard that serves the store."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tests.reconcile import reconcile
from tests.tracking.memory import Run
from topotune.errors import RunError
from topotune.records import EpochReport, Outcome
from topotune.tracking.entries import Item
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.pages import run_page, trials_page
from topotune.tracking.progress import Progress
from topotune.tracking.serve import Dashboard, free_port, serve_dashboard
from topotune.tracking.shipper import Shipper
from topotune.tracking.store import RunMissingError, StoreOfflineError, StoreRefusedError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's and SQLAlchemy's


class Answers(BaseHTTPRequestHandler):
    """A server that knows the experiment and answers everything else with one status."""

    status = 200
    body = b"{}"
    posts: ClassVar[list[str]]

    def do_GET(self) -> None:
        run = {"run_id": "a" * 32, "experiment_id": "1", "artifact_uri": "mlflow-artifacts:/1/a"}
        experiment = {"experiment_id": "1", "lifecycle_stage": "active"}
        self.reply(200, json.dumps({"experiment": experiment, "run": {"info": run}}).encode())

    def do_POST(self) -> None:
        self.posts.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(self.status, self.body)

    def do_PUT(self) -> None:
        self.do_POST()

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", "60")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def answering(status: int, body: bytes, posts: list[str]) -> Iterator[str]:
    handler = type("Handler", (Answers,), {"status": status, "body": body, "posts": posts})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://user:hunter2@127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def code(name: str) -> bytes:
    return json.dumps({"error_code": name, "message": "because"}).encode()


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, code("INVALID_PARAMETER_VALUE"), StoreRefusedError),
        (400, b"<html>The plain HTTP request was sent to HTTPS port</html>", StoreOfflineError),
        (402, b"<html>pay first</html>", StoreOfflineError),
        (405, b"<html>not allowed</html>", StoreOfflineError),
        (405, b'{"message": "not allowed"}', StoreOfflineError),
        (407, b"<html>proxy authentication required</html>", StoreOfflineError),
        (422, b"<html>unfit</html>", StoreOfflineError),
        (426, b"<html>upgrade required</html>", StoreOfflineError),
        (413, b"too large", StoreRefusedError),
        (404, code("RESOURCE_DOES_NOT_EXIST"), RunMissingError),
        (404, b"nginx: not found", StoreOfflineError),
        (401, b"who are you", StoreOfflineError),
        (403, code("PERMISSION_DENIED"), StoreOfflineError),
        (408, b"", StoreOfflineError),
        (429, code("REQUEST_LIMIT_EXCEEDED"), StoreOfflineError),
        (500, code("INTERNAL_ERROR"), StoreOfflineError),
        (503, b"", StoreOfflineError),
        (200, b"<html>please log in</html>", StoreOfflineError),
    ],
)
def test_each_answer_is_temporary_or_final(
    status: int, body: bytes, expected: type[RunError]
) -> None:
    posts: list[str] = []
    with answering(status, body, posts) as uri, pytest.raises(expected) as caught:
        MlflowStore(uri).log("a" * 32, [Item("metric", "loss", 1.0, 1, 5)])
    assert posts == ["/api/2.0/mlflow/runs/log-batch"]  # MLflow itself must not try again
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, code("INVALID_PARAMETER_VALUE"), StoreRefusedError),
        (413, b"<html>too large</html>", StoreRefusedError),
        (400, b"<html>bad</html>", StoreOfflineError),
        (405, b"<html>not allowed</html>", StoreOfflineError),
        (405, b'{"message": "not allowed"}', StoreOfflineError),
    ],
)
def test_an_upload_that_a_proxy_answers_is_tried_again(
    status: int, body: bytes, expected: type[RunError], tmp_path: Path
) -> None:
    (tmp_path / "trace.npz").write_bytes(b"trace")
    posts: list[str] = []
    run = uuid.uuid4().hex  # MLflow remembers where a run's files go
    with answering(status, body, posts) as uri, pytest.raises(expected):
        MlflowStore(uri).log_artifact(run, tmp_path / "trace.npz", "")
    assert posts == ["/api/2.0/mlflow-artifacts/artifacts/1/a/trace.npz"]


def test_a_misrouted_request_costs_no_record(tmp_path: Path) -> None:
    """A reverse proxy that answers in MLflow's place sets nothing aside: all is sent later."""
    record(tmp_path, range(1, 4))
    with answering(405, b"<html>not allowed</html>", []) as uri:
        store = MlflowStore(uri)
        progress = Progress(tmp_path, store.label)
        progress.runs |= {"search": "b" * 32, "0": "a" * 32}
        progress.save()
        shipper = Shipper(tmp_path, store, "s1", "digits")
        assert not shipper.ship_once()
        status = shipper.status()
    assert (status.refused, status.shipped) == (0, 0)
    assert status.pending == status.recorded > 0
    assert not (tmp_path / "refused.jsonl").exists()


def record(search: Path, epochs: range) -> None:
    trial = Run(search, 0)
    trial.start({"lr": 0.1}, {"device": "cpu"})
    for epoch in epochs:
        trial.epoch(EpochReport(epoch, epoch, {"loss": 1.0 / epoch}, 0.1, 1_700_000_000_000))


def until(shipper: Shipper, pending: bool) -> None:
    """Wait until the shipper is in trouble, or through with everything."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = shipper.status()
        if bool(status.last_error) if pending else status.recorded and not status.pending:
            return
        time.sleep(0.05)
    raise AssertionError(f"still {shipper.status()}")


@pytest.fixture(scope="module")
def results_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def embedded(results_dir: Path) -> MlflowStore:
    """One embedded store for the module: making one takes seconds."""
    return MlflowStore.embedded(results_dir)


@pytest.mark.heavy
def test_a_server_that_comes_and_goes_loses_nothing(
    results_dir: Path, embedded: MlflowStore
) -> None:
    search = results_dir / "digits"
    search.mkdir()
    port = free_port(0)
    shipper = Shipper(search, MlflowStore(f"http://127.0.0.1:{port}"), "s1", "digits", 0.05, 1.0)
    Run(search, None).start({"sampler": "tpe"}, {})
    trace = search / "trace.npz"
    trace.write_bytes(b"trace")
    record(search, range(1, 6))
    shipper.start()
    until(shipper, pending=True)
    assert shipper.status().shipped == 0
    assert (
        "no answer from the server: [Errno 111] Connection refused" in shipper.status().last_error
    )
    for first in (6, 11):  # two servers, each killed: the data recorded meanwhile must arrive
        server = serve_dashboard(embedded, port)
        try:
            assert server.url == f"http://127.0.0.1:{port}"
            until(shipper, pending=False)
        finally:
            server.stop(grace=0.0)
        record(search, range(first, first + 5))
        if first == 6:
            until(shipper, pending=True)
            Run(search, None).artifact(trace)
            Run(search, 0).end(Outcome.PRUNED, "rung")
    left = shipper.close(timeout=2.0)
    assert left.pending > 0
    assert left.recorded == left.shipped + left.pending
    # What `topotune sync` does later, here straight into the database behind the server.
    later = Shipper(search, embedded, "s1", "digits")
    assert later.close(timeout=60).complete
    check = reconcile(search, embedded, "s1")
    assert check.complete
    assert (check.recorded, check.runs) == (45, 2)
    parent = embedded.parent("s1")
    assert parent is not None
    assert [f.path for f in embedded.client().list_artifacts(parent.run_id)] == ["trace.npz"]


@pytest.mark.heavy
def test_the_dashboard_serves_a_search_and_ends_with_us(
    results_dir: Path, embedded: MlflowStore
) -> None:
    store = embedded
    search = results_dir / "faces"
    search.mkdir()
    record(search, range(1, 3))
    assert Shipper(search, store, "s2", "faces").ship_once()
    parent = store.parent("s2")
    assert parent is not None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = serve_dashboard(store, taken.getsockname()[1])
        busy = taken.getsockname()[1]
    with server:
        assert not server.url.endswith(str(busy))
        pid = server.pid
        assert pid is not None
        assert b"<html" in fetch(server.url + "/").lower()
        query = f"{server.url}/ajax-api/2.0/mlflow/runs/get?run_id={parent.run_id}"
        assert json.loads(fetch(query))["run"]["info"]["run_name"] == "faces"
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        server.wait()
        assert server.running()
    assert not server.running()
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)
    assert not list(results_dir.rglob("mlruns"))


def test_addresses_of_pages() -> None:
    view = "workflowType=machine_learning"
    assert run_page("http://h", "1", "r") == f"http://h/#/experiments/1/runs/r?{view}"
    trials = f"http://h/#/experiments/1/runs?{view}"
    trials += "&searchFilter=tags.mlflow.parentRunId%20%3D%20%27r%27"
    assert trials_page("http://h", "1", "r") == trials
    ordered = trials + "&orderByKey=metrics.%60val_loss%60&orderByAsc=true&compareRunsMode=CHART"
    assert trials_page("http://h", "1", "r", "val_loss", maximize=False) == ordered


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return bytes(answer.read())


def test_a_tracking_server_is_its_own_dashboard() -> None:
    dashboard = serve_dashboard(MlflowStore("https://user:hunter2@mlflow.example/"))
    assert dashboard.url == "https://mlflow.example"
    assert not dashboard.running()
    dashboard.wait()
    dashboard.stop()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    log = (tmp_path / "log").open("w+b")
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "print('no such revision at db://u:hunter2@h'); raise SystemExit(3)",
        ],
        stdout=log,
        start_new_session=True,
    )
    process.wait()
    dashboard = Dashboard("http://127.0.0.1:9", process, log)
    from topotune.tracking.serve import _wait_for_health

    with pytest.raises(RunError, match=r"ended at its start: no such revision at db://\*\*\*@h"):
        _wait_for_health(dashboard, log, 5.0)
    dashboard.stop()
    assert log.closed


@pytest.mark.heavy
def test_two_processes_may_make_the_store_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from topotune.tracking.mlflow import MlflowStore;"
        "print(MlflowStore.embedded(Path(sys.argv[1])).experiment_id)"
    )
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", program, str(tmp_path)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1]
    assert answers[0][1] == ""
