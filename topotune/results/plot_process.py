"""Figures of trials, drawn by a process of their own.

matplotlib holds the interpreter for a quarter of a second a figure. Beside a search's driver that
was two fifths of what its one interpreter did where trials are short, while workers waited for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, TypeAlias

import topotune
from topotune.errors import RunError

Kind: TypeAlias = Literal["trace", "relaxation"]

START_SECONDS = 300.0
"""matplotlib's first import on a machine looks for fonts."""
DRAW_SECONDS = 60.0
"""A figure that is not there by then never comes: its process is stopped, or dead but in name."""
LATE_AT_MOST = 2
"""So many waits in vain one after the other are the last ones."""
_CLOSE_SECONDS = 5.0
_LONGEST = 2000  # characters of a reason

# The package by its file: no folder is put on the path, whose other files could be imported.
_PROGRAM = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("topotune", sys.argv[1])
sys.modules["topotune"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from topotune.results.plot_process import main
main(int(sys.argv[2]))
"""


class PlotProcess:
    """Draws one figure after the other; started by the first, and again if it has died.

    It ends with whoever started it, kill -9 included: it lives on what it is asked. For one thread
    at a time, but for :meth:`abort`.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1
        self._late = 0
        self._aborted = False

    def draw(self, kind: Kind, source: Path, picture: Path, title: str) -> None:
        """Draw a trial's archive, as ``plot_trace`` or ``plot_relaxation`` would here.

        Args:
            kind: what the archive holds.
            source: the archive (``.npz``).
            picture: where to write (``.png``).
            title: shown above.

        Raises:
            RunError: it cannot be read, drawn or written, or the process has died of it.
        """
        if self._late >= LATE_AT_MOST:
            raise RunError(f"{picture}: the process that draws has come to nothing too often")
        if self._process is None:
            self._start()
            if self._aborted:
                self._end()
                raise RunError(f"{picture}: not drawn any more")
            self._answer(picture, START_SECONDS)
        assert self._process is not None
        assert self._process.stdin is not None
        request = json.dumps([kind, str(source), str(picture), title]) + "\n"
        with contextlib.suppress(BrokenPipeError):  # it has died, which its answer tells
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
        if reason := self._answer(picture, DRAW_SECONDS):
            raise RunError(reason)

    def abort(self) -> None:
        """Draw nothing more, from another thread: who waits for a figure is told."""
        self._aborted = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_SECONDS)
            self._end()

    def _start(self) -> None:
        # A session of its own: a Ctrl-C is the driver's, which lets the figure be finished. A pipe
        # of its own: what a library prints is no answer.
        self._answers, theirs = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(topotune.__file__), str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs],
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._answers)
            raise RunError(f"the process that draws cannot be started: {error}") from error
        finally:
            os.close(theirs)

    def _answer(self, picture: Path, seconds: float) -> str:
        """The next answer: empty, or the reason why not."""
        end, line = time.monotonic() + seconds, b""
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, 1e3 * (end - time.monotonic()))):
                self._end()
                self._late += 1
                raise RunError(
                    f"{picture}: the process that draws did not answer for {seconds:g} s"
                )
            if not (part := os.read(self._answers, 4096)):
                code = self._end()
                raise RunError(f"{picture}: the process that draws has ended (exit code {code})")
            line += part
        self._late = 0
        return str(json.loads(line))

    def _end(self) -> int | None:
        """Kill it if it lives; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        os.close(self._answers)
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_CLOSE_SECONDS)
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        return process.returncode


def main(answers: int) -> None:
    """Draw what standard input asks for, a JSON line each.

    Args:
        answers: the descriptor for an empty line of JSON when it is ready, and then for one a
            figure: why it could not be drawn, or empty.
    """
    import matplotlib.figure  # noqa: F401 - takes its time

    from topotune.results.plots import plot_relaxation, plot_trace

    plots = {"trace": plot_trace, "relaxation": plot_relaxation}
    _tell(answers, "")
    for line in sys.stdin:
        kind, source, picture, title = json.loads(line)
        try:
            plots[kind](Path(source), Path(picture), title)
            reason = ""
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            reason = str(error) or type(error).__name__
        _tell(answers, reason)


def _tell(answers: int, reason: str) -> None:
    with os.fdopen(os.dup(answers), "w", encoding="ascii") as stream:
        stream.write(json.dumps(reason[:_LONGEST]) + "\n")
