"""Leaves no process behind: ends all that a session started, however its driver ended.

A session's processes (Ray's own, the workers, and what a trial has started, detached or frozen)
carry a mark in their environment. :class:`Sweeper` runs a small process beside the driver that
waits for the driver's end, kill -9 included, and then ends all that carry the mark.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from typing import Self

MARK = "TOPOTUNE_SESSION"
SWEEP_SECONDS = 5.0
"""How long it takes at most; a process that was just forked may need a second look."""


class Sweeper:
    """Marks what is started inside of it, and ends that with the driver."""

    def __init__(self) -> None:
        self._before: str | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._before = os.environ.get(MARK)
        mark = uuid.uuid4().hex
        os.environ[MARK] = mark
        # Its own session: a signal of the terminal must not end it before its work is done.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, mark],  # -P: what lies in this folder is not imported
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            os.environ.pop(MARK, None)
        else:
            os.environ[MARK] = self._before
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2 * SWEEP_SECONDS)


def sweep(mark: str) -> int:
    """Kill every process, this one excepted, whose environment began with the mark; how many."""
    import psutil

    killed = 0
    for process in psutil.process_iter():
        # A process of another user, or one that has just ended, cannot be asked.
        with contextlib.suppress(psutil.Error, OSError):
            ours = process.pid != os.getpid() and process.environ().get(MARK) == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                killed += 1
    return killed


def main() -> None:
    """Wait until standard input closes, which the driver's end does; then sweep until clean."""
    while sys.stdin.buffer.read(1):
        pass
    until = time.monotonic() + SWEEP_SECONDS
    while sweep(sys.argv[1]) and time.monotonic() < until:
        time.sleep(0.2)


if __name__ == "__main__":
    main()
