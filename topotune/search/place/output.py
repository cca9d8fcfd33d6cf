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
import time
from collections.abc import Iterable
from pathlib import Path

from topotune.redaction import redact

OUTPUT_FILE = "output.txt"
ERROR_FILE = "error.txt"
"""The traceback of the exception that ended a trial."""
MAX_BYTES = 8 * 2**20
"""What is kept of a trial's output at most: its beginning and its end."""
_HEAD, _TAIL = 2**20, 3 * 2**20
LOOK_EVERY = 0.25
TIDY_SECONDS = 3.0
"""How long the files of killed workers may take at the end of a session."""


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
        self._clean = 0  # bytes at the beginning that have been searched for secrets
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
        """As :func:`tidy`, of what was printed since the last time: this may be every epoch."""
        _flush()
        with self._writing:
            self._clean = tidy(self._path, keep=True, clean=self._clean)

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
                    self._clean = 0
                    _shorten(self._path)


def read(path: Path) -> str:
    """What a trial has printed, without secrets and within the bounds; empty for nothing.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        content = _bounded(path)
    except FileNotFoundError:
        return ""
    return redact(content.decode("utf-8", "replace"))


def tidy_killed(folders: Iterable[Path]) -> None:
    """As :func:`tidy`, of trials whose worker did not come to it; at the end of a session.

    Args:
        folders: of the trials.
    """
    end = time.monotonic() + TIDY_SECONDS  # a stop must not take long; a resume does the rest
    for folder in folders:
        if time.monotonic() < end:
            tidy(folder / OUTPUT_FILE)


def tidy(path: Path, keep: bool = False, clean: int = 0) -> int:
    """Bring a file of output within its bounds and take the secrets out of it.

    Args:
        path: the file; none is fine.
        keep: also an empty one, which a process may still write to.
        clean: bytes at its beginning that are without secrets as they are.

    Returns:
        How many are so now: all whole lines.
    """
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        if not size and not keep:
            path.unlink()
            return 0
        if size > MAX_BYTES:
            _shorten(path)
            clean = 0
        with path.open("rb") as file:
            file.seek(clean)
            content = file.read()
        text = redact(content.decode("utf-8", "surrogateescape"))
        without = text.encode("utf-8", "surrogateescape")
        if without != content:
            _replace(path, without, clean)
        return clean + without.rfind(b"\n") + 1  # a line may be half a secret so far
    return 0


def _bounded(path: Path) -> bytes:
    """The file, of one that is too long its beginning and its end."""
    with path.open("rb") as file:
        if (size := file.seek(0, os.SEEK_END)) <= MAX_BYTES:
            file.seek(0)
            return file.read(MAX_BYTES)
        file.seek(0)
        head = file.read(_HEAD)
        file.seek(size - _TAIL)
        tail = file.read(_TAIL)
    head, tail = head[: head.rfind(b"\n") + 1] or head, tail[tail.find(b"\n") + 1 :] or tail
    left_out = size - len(head) - len(tail)
    return head + b"\n(%d bytes are left out here)\n\n" % left_out + tail


def _shorten(path: Path) -> None:
    """Leave the middle out; lines that are printed at this very moment may go with it."""
    _replace(path, _bounded(path))


def _replace(path: Path, content: bytes, at: int = 0) -> None:
    """Write the file anew in place from there on: others append to it under the same descriptor."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)
        file.truncate()


def _flush() -> None:
    """Bring what Python and the C library hold back to where it is now going."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    ctypes.CDLL(None).fflush(None)
