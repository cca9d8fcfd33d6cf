"""A PostgreSQL server of a row's own, with a password, on 127.0.0.1 or an address that is given."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from topotune.bench.scaling.processes import free_port

START_SECONDS = 60.0


def program(name: str) -> str | None:
    """Where a program of the server is: on the path, or where Debian puts it."""
    debian = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *debian]))


def installed() -> bool:
    """Whether the server's programs are here."""
    return bool(program("initdb") and program("postgres"))


class Postgres:
    """A server with an empty data folder, which goes with it.

    Args:
        host: the address of this machine that it listens at, for that one's whole network.

    Attributes:
        port: where it listens.
        password: of its one user, ``tester``; random.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self.port = free_port()
        self.password = f"planted-{secrets.token_hex(8)}"
        self._server: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()
        # The server refuses to run as root.
        user = "postgres" if os.geteuid() == 0 else None
        self._as: dict[str, Any] = {} if user is None else {"user": user, "extra_groups": []}

    @property
    def uri(self) -> str:
        """Its address, password and all."""
        return f"postgresql://tester:{self.password}@{self._host}:{self.port}/postgres"

    def __enter__(self) -> Self:
        assert installed(), "PostgreSQL's server (initdb, postgres) is not installed"
        try:
            self._make()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="topo-")))
        secret = self._folder / "password"
        secret.write_text(self.password, encoding="ascii")
        if self._as:
            owner = pwd.getpwnam(self._as["user"])
            for path in (self._folder, secret):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        options = ["-U", "tester", "-A", "scram-sha-256", f"--pwfile={secret}", "--no-sync"]
        done = subprocess.run(
            [str(program("initdb")), "-D", str(self._folder / "data"), *options],
            capture_output=True,
            text=True,
            cwd=self._folder,
            **self._as,
        )
        assert done.returncode == 0, f"initdb failed: {done.stderr[-500:]}"
        with (self._folder / "data" / "pg_hba.conf").open("a", encoding="ascii") as file:
            file.write("host all all samenet scram-sha-256\n")

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGQUIT)
        self._stack.close()

    def start(self) -> None:
        """Start it, and wait until it listens."""
        options = ["-D", str(self._folder / "data"), "-p", str(self.port)]
        options += ["-c", f"listen_addresses={self._host}", "-c", "unix_socket_directories="]
        with (self._folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [str(program("postgres")), *options],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                **self._as,
            )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex((self._host, self.port)) == 0:
                    return
            time.sleep(0.1)
        text = (self._folder / "log").read_text(encoding="utf-8", errors="replace")
        raise AssertionError(f"PostgreSQL does not start: {text[-500:]}")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT cuts its connections and shuts down, SIGQUIT is as a crash."""
        server, self._server = self._server, None
        if server is not None:
            server.send_signal(how)
            server.wait(60)
