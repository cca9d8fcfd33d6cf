"""An S3 server on 127.0.0.1 for tests, and a gate before it that can be shut or cut."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Self

from topotune.bench.scaling.processes import free_port

_HOST = "127.0.0.1"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "planted-key-of-tests",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-of-tests",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def program() -> str | None:
    """moto's server: beside this interpreter, or on the path."""
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return shutil.which("moto_server", path=os.pathsep.join(places))


class ObjectServer:
    """moto's S3, in memory, reached through a :class:`Gate`.

    Attributes:
        gate: what clients connect to.
    """

    def __enter__(self) -> Self:
        found = program()
        assert found is not None, "moto_server is not installed: pip install 'moto[s3]'"
        self._port = free_port()
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [found, "-H", _HOST, "-p", str(self._port)], stdout=self._log, stderr=self._log
        )
        end = time.monotonic() + 60
        while True:
            with suppress(OSError), socket.create_connection((_HOST, self._port), 1):
                break
            assert self._process.poll() is None, "moto_server does not start"
            assert time.monotonic() < end, "moto_server does not listen"
            time.sleep(0.1)
        self.gate = Gate(self._port)
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.close()
        self._process.kill()
        self._process.wait()
        self._log.close()

    def bucket(self, name: str) -> None:
        """Make a bucket."""
        url = f"http://{_HOST}:{self._port}/{name}"
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=30):
            pass

    def address(self, place: str) -> str:
        """The address of a bucket and prefix, as a user writes it."""
        return f"s3://{place}?endpoint_override=http://{_HOST}:{self.gate.port}&region=us-east-1"

    def requests(self) -> list[str]:
        """Method and path of all requests so far."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        return [line.partition('] "')[2] for line in lines if '] "' in line]


class Gate:
    """Passes TCP connections on.

    Attributes:
        port: where it listens.
        cut_after: bytes from clients after which every connection breaks; None for never.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self.cut_after: int | None = None
        self.passed = 0
        self._lock = threading.Lock()  # nothing is let in after a close
        self._open: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.port = free_port()
        self.open()

    def open(self) -> None:
        """Let connections in."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with self._lock:  # a client sees the first connection break before the last is closed
            listener.bind((_HOST, self.port))
            listener.listen(64)
            self._listener, self.cut_after, self.passed = listener, None, 0
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def close(self) -> None:
        """Refuse connections, and break those there are."""
        self._end(self._listener)

    def _end(self, listener: socket.socket | None) -> None:
        """Close what this listener let in; nothing if the gate was closed, or opened, since."""
        with self._lock:
            if listener is None or listener is not self._listener:
                return
            self._listener = None
            opened, self._open = self._open, []
            for one in (listener, *opened):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            try:
                server = socket.create_connection((_HOST, self._target), 10)
            except OSError:
                client.close()
                continue
            with self._lock:
                closed = listener is not self._listener
                if not closed:
                    self._open += [client, server]
            if closed:  # since the client was accepted
                client.close()
                server.close()
                return
            up = (client, server, listener)
            threading.Thread(target=self._pump, args=up, daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client), daemon=True).start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, counted: socket.socket | None = None
    ) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if counted:
                    self.passed += len(data)
                    if self.cut_after is not None and self.passed > self.cut_after:
                        self._end(counted)
                        return
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
