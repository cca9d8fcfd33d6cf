"""Runs MLflow's web interface over a store, on a port of this machine alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO, Self

from topotune.errors import ConfigError, ResourceError, RunError
from topotune.redaction import redact
from topotune.tracking.mlflow import MlflowStore

HOST = "127.0.0.1"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEFAULT_PORT = 5000


def server_address(tracking_uri: str) -> str:
    """A tracking server's address for a browser, which asks for user and password itself."""
    scheme, mark, rest = tracking_uri.partition("://")
    path = rest.rpartition("@")[2].partition("?")[0]
    return redact(f"{scheme}{mark}{path}").rstrip("/")


class Dashboard:
    """A running MLflow server, stopped by :meth:`stop` or at the end of a ``with`` block.

    Attributes:
        url: its address; that of the tracking server itself if the store is one.
    """

    def __init__(
        self, url: str, process: subprocess.Popen[bytes] | None = None, log: IO[bytes] | None = None
    ) -> None:
        self.url = url
        self._process = process
        self._log = log

    @property
    def pid(self) -> int | None:
        """Process id of the server; None if it is not ours."""
        return None if self._process is None else self._process.pid

    def running(self) -> bool:
        """Whether our server runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self, grace: float = 5.0) -> None:
        """End the server and its workers; by force after ``grace`` seconds. May be repeated."""
        process, self._process = self._process, None
        if process is not None:
            _signal_group(process, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            _signal_group(process, signal.SIGKILL)  # workers that outlived their parent
            process.wait()
        if self._log is not None:
            self._log.close()

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return when the server ends or this process gets SIGINT, SIGTERM or SIGHUP.

        To be called in the main thread. Where the server is not ours there is nothing to wait for.

        Args:
            meanwhile: done first, while the server runs; the same signals end it.
        """
        if self._process is not None:
            with suppress(StopRequest), stop_signals():
                meanwhile()
                self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve_dashboard(
    store: MlflowStore, port: int = DEFAULT_PORT, start_timeout: float = 120.0
) -> Dashboard:
    """Start MLflow's web interface on 127.0.0.1, or give the address of a server that runs.

    Args:
        store: what to show. Its address goes to the server through the environment, so that a
            password in it is not in the process list.
        port: preferred port; another one is taken if it is in use.
        start_timeout: seconds until the server must answer.

    Raises:
        ResourceError: no port can be bound.
        KeyboardInterrupt: this process got SIGINT, SIGTERM or SIGHUP meanwhile.
        RunError: the server ended, or did not answer in time; with the end of its log.
        StoreOfflineError: the store cannot be opened.
    """
    if store.on_server:
        return Dashboard(server_address(store.tracking_uri))
    store.ping()  # made and migrated by one process, before the server looks at it
    chosen = free_port(port)
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by Dashboard.stop
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": store.tracking_uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(chosen)]
    if store.artifacts is not None:
        command += ["--artifacts-destination", str(store.artifacts)]
    if store.artifacts is not None:
        store.artifacts.mkdir(parents=True, exist_ok=True)
    dashboard: Dashboard | None = None
    try:
        with stop_signals():
            # A session of its own: Ctrl-C reaches this process only, which ends the whole group.
            process = subprocess.Popen(
                [*command, "--workers", "1"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=store.artifacts or tempfile.gettempdir(),
            )
            dashboard = Dashboard(f"http://{HOST}:{chosen}", process, log)
            _wait_for_health(dashboard, log, start_timeout)
    except BaseException as error:
        if dashboard is not None:
            dashboard.stop()
        if isinstance(error, StopRequest):
            raise KeyboardInterrupt from None
        raise
    return dashboard


def _wait_for_health(dashboard: Dashboard, log: IO[bytes], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if not dashboard.running():
            raise RunError(f"the MLflow server ended at its start: {_log_end(log)}")
        try:
            with opener.open(f"{dashboard.url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise RunError(
        f"the MLflow server did not answer within {timeout:g} s at {dashboard.url}: {_log_end(log)}"
    )


def _log_end(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
    return redact(" | ".join(lines[-5:])) or "it printed nothing"


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return


class StopRequest(BaseException):
    """A signal asks this process to end."""


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn the signals that end a process into StopRequest; the old handlers are put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise StopRequest

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_port(port: int) -> None:
    """Refuse what is no port.

    Raises:
        ConfigError: it is not from 0 to 65535.
    """
    if not 0 <= port < 2**16:
        raise ConfigError("--port", f"must be from 0 (any free one) to 65535 (got {port})")


def free_port(preferred: int) -> int:
    """The preferred port of 127.0.0.1 if it is free, else any free one.

    Raises:
        ResourceError: none can be bound.
    """
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except (OSError, OverflowError):
                continue
            return int(probe.getsockname()[1])
    raise ResourceError(f"port {preferred} of {HOST}: neither it nor any other port can be bound")
