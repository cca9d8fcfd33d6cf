"""What a trial prints: its worker's standard output and error, in a file of the trial's folder.

Both go straight into the file, below Python too and from every process that the trial starts, so
that the last words of one that crashes are there. What is printed is searched for secrets, and its
middle left out where it is too long, at the trial's end and wherever it is read; a file that grows
fast is shortened meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from pathlib import Path

from topotune.redaction import redact

OUTPUT_FILE = "output.txt"
ERROR_FILE = "error.txt"
"""The traceback of the exception that ended a trial."""
MAX_BYTES = 8 * 2**20
"""What is kept of a trial's output at most: its beginning and its end."""
_HEAD, _TAIL = 2**20, 3 * 2**20
LOOK_EVERY = 0.25


class Output:
    """Takes this process's standard output and error until :meth:`close`.

    Args:
        folder: the trial's folder; where nothing can be written to it, all stays as it is.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / OUTPUT_FILE
        self._saved: list[int] = []
        self._over = threading.Event()
        self._writing = threading.Lock()
        tidy(self._path)  # what a worker has left that was killed
        _flush()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError:
            return
        try:
            self._saved = [os.dup(1), os.dup(2)]
            os.dup2(file, 1)
            os.dup2(file, 2)
        finally:
            os.close(file)
        self._watcher = threading.Thread(target=self._watch, name="output", daemon=True)
        self._watcher.start()

    def tidy(self) -> None:
        """As :func:`tidy`, of what was printed by now."""
        _flush()
        with self._writing:
            tidy(self._path, keep=True)

    def close(self) -> None:
        """Give both back, and leave the file tidy; none where nothing was printed."""
        self._over.set()
        _flush()
        for place, saved in enumerate(self._saved, start=1):
            os.dup2(saved, place)
            os.close(saved)
        if self._saved:
            self._watcher.join()
            self._saved = []
            tidy(self._path)

    def _watch(self) -> None:
        while not self._over.wait(LOOK_EVERY):
            with contextlib.suppress(OSError), self._writing:
                if self._path.stat().st_size > MAX_BYTES:
                    _shorten(self._path)


def read(path: Path) -> str:
    """What a trial has printed, without secrets; empty for nothing.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(2 * MAX_BYTES)
    except FileNotFoundError:
        return ""
    return redact(content.decode("utf-8", "replace"))


def tidy(path: Path, keep: bool = False) -> None:
    """Bring a file of output within its bounds and take the secrets out of it.

    Args:
        path: the file; none is fine.
        keep: also an empty one, which a process may still write to.
    """
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        if not size and not keep:
            path.unlink()
            return
        if size > MAX_BYTES:
            _shorten(path)
        content = path.read_bytes()
        text = redact(content.decode("utf-8", "surrogateescape"))
        clean = text.encode("utf-8", "surrogateescape")
        if clean != content:
            _replace(path, clean)


def _shorten(path: Path) -> None:
    """Leave the middle out; lines that are printed at this very moment may go with it."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
        size = file.seek(0, os.SEEK_END)
        file.seek(size - _TAIL)
        tail = file.read(_TAIL)
    head, tail = head[: head.rfind(b"\n") + 1] or head, tail[tail.find(b"\n") + 1 :] or tail
    left_out = size - len(head) - len(tail)
    _replace(path, head + b"\n(%d bytes are left out here)\n\n" % left_out + tail)


def _replace(path: Path, content: bytes) -> None:
    """Write the file anew in place: others append to it under the same descriptor."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def _flush() -> None:
    """Bring what Python and the C library hold back to where it is now going."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    ctypes.CDLL(None).fflush(None)
