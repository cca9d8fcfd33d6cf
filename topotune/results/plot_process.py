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
from pathlib import Path
from typing import Literal, TypeAlias

from topotune.errors import RunError

Kind: TypeAlias = Literal["trace", "relaxation"]

DRAW_SECONDS = 60.0
"""A figure that is not there by then never comes: its process is stopped, or dead but in name."""
_CLOSE_SECONDS = 5.0

_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from topotune.results.plot_process import main; main()"
)


class PlotProcess:
    """Draws one figure after the other; started by the first, and again if it has died.

    It ends with whoever started it, kill -9 included: it lives on what it is asked. For one thread
    at a time.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

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
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        request = json.dumps([kind, str(source), str(picture), title]) + "\n"
        answer = b""
        with contextlib.suppress(BrokenPipeError):  # it has died, which its answer tells
            process.stdin.write(request.encode())
            process.stdin.flush()
            if select.select([process.stdout], [], [], DRAW_SECONDS)[0]:
                answer = process.stdout.readline()
        if not answer.endswith(b"\n"):
            code = self._end()
            raise RunError(f"{picture}: the process that draws has ended (exit code {code})")
        if reason := json.loads(answer):
            raise RunError(str(reason))

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_SECONDS)
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        # -P and our own root: what lies in this folder is not imported. A session of its own: a
        # Ctrl-C is the driver's, which lets the figure be finished.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._process

    def _end(self) -> int | None:
        """Kill it if it lives; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return code


def main() -> None:
    """Draw what standard input asks for, a JSON line each, and answer with the reason why not."""
    from topotune.results.plots import plot_relaxation, plot_trace

    plots = {"trace": plot_trace, "relaxation": plot_relaxation}
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        kind, source, picture, title = json.loads(line)
        try:
            plots[kind](Path(source), Path(picture), title)
            reason = ""
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            reason = str(error) or type(error).__name__
        answers.write(json.dumps(reason) + "\n")
        answers.flush()
