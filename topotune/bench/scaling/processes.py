"""Real processes that end with a block: commands, and the nodes of a Ray cluster of their own."""

from __future__ import annotations

import os
import random
import re
import secrets
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from topotune.errors import RunError

_MARK = "TOPOTUNE_PROCESSES"
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_PORT = 20_000
"""Above the ports that Ray gives its workers on a cluster of several nodes."""


def free_port() -> int:
    """A free port of 127.0.0.1 that no outgoing connection is given while its server is down."""
    highest = int(_PORT_RANGE.read_text("ascii").split()[0]) if _PORT_RANGE.exists() else 32_768
    chance = random.SystemRandom()
    for _ in range(200):
        port = chance.randrange(_LOWEST_PORT, max(highest, _LOWEST_PORT + 1000))
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise RunError("no free port is found")


def marked(name: str, value: str) -> list[psutil.Process]:
    """All living processes that began with this variable in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get(name) == value
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Command:
    """A running command; its output goes to a file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def output(self) -> str:
        """Standard output and error so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")


class Processes:
    """Starts commands in a folder; leaving the block ends whatever still runs, however detached.

    Args:
        folder: made where it is missing; each command's log goes there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark = uuid.uuid4().hex
        self._commands: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for command in self._commands:
            command.kill()
            command.wait()

    def environment(self, changes: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of these processes, by which they are found again."""
        return {**os.environ, _MARK: self._mark, "OMP_NUM_THREADS": "1", **(changes or {})}

    def spawn(
        self, command: Sequence[str], environment: Mapping[str, str], **popen: Any
    ) -> tuple[subprocess.Popen[bytes], Path]:
        """Start a command; its process and its log."""
        log = self.folder / f"command-{len(self._commands) + 1}.log"
        with log.open("wb") as out:
            outputs = {"stdout": out, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            process = subprocess.Popen(
                command, env=environment, cwd=self.folder, **{**outputs, **popen}
            )
        self._commands.append(process)
        return process, log

    def processes(self) -> list[psutil.Process]:
        """All living processes that these commands started."""
        return marked(_MARK, self._mark)

    def wait(
        self,
        condition: Callable[[], bool],
        seconds: float,
        what: str,
        seen: Callable[[], str] = str,
    ) -> float:
        """Wait until a condition holds; how long that took.

        Raises:
            RunError: it does not hold within ``seconds``; the text is ``what`` and ``seen()``.
        """
        began = time.monotonic()
        while not condition():
            waited = time.monotonic() - began
            if waited > seconds:
                raise RunError(f"{what} after {waited:.0f} s: {seen()}")
            time.sleep(0.05)
        return time.monotonic() - began


class Node(Command):
    """A Ray node of its own, as ``ray start`` makes it.

    Args:
        site: whose processes it belongs to.
        environment: with the token of the cluster.
        arguments: of ``ray start``.
    """

    def __init__(self, site: Processes, environment: dict[str, str], *arguments: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += ["--disable-usage-stats", *arguments]
        super().__init__(*site.spawn(command, environment))
        site.wait(lambda: "block forever" in self.output(), 60, "no node", self.output)

    def processes(self) -> list[psutil.Process]:
        """All processes below ``ray start``: what serves the node, and the workers on it."""
        with suppress(psutil.NoSuchProcess):
            return list(psutil.Process(self.pid).children(recursive=True))
        return []


def with_token() -> dict[str, str]:
    """The environment of a cluster that asks for a token: a new, random one."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def start_head(site: Processes, environment: dict[str, str]) -> tuple[Node, str]:
    """The head of a cluster, which runs no trial itself; and the cluster's address."""
    port = free_port()
    arguments = ("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")
    head = Node(site, environment, *arguments)
    found = re.search(rf"[\w.:]+:{port}", head.output())
    if found is None:
        raise RunError(f"no address: {head.output()[-500:]}")
    return head, found[0]
