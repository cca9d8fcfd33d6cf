"""The spool's file format: one checked line a record, appended whole, read whatever its state.

A line is ``crc32 length payload\\n``: eight hexadecimal digits of the payload's CRC-32, eight of
its length in bytes, and the payload as strict JSON without raw newlines. A crash in mid-write
leaves a tail without a newline, which readers leave alone and the next writer cuts off; a line
whose check fails is reported and skipped, and the next newline is where reading goes on.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from topotune.errors import ResourceError, SpoolError
from topotune.files import make_folder, sync_folder

MAX_LINE = 1 << 23
"""Bytes of the longest line that is written or believed."""

_HEAD = re.compile(rb"([0-9a-f]{8}) ([0-9a-f]{8}) ")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """One intact line: its bytes are ``[start, end)`` of the file."""

    start: int
    end: int
    payload: dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """What one read found.

    Attributes:
        lines: the intact lines, in order.
        damaged: (offset, reason) of each line that was skipped.
        end: offset after the last complete line; where to read next.
    """

    lines: tuple[Line, ...]
    damaged: tuple[tuple[int, str], ...]
    end: int


def encode(payload: Mapping[str, Any]) -> bytes:
    """A payload as one line.

    Raises:
        SpoolError: it is not strict JSON, or longer than ``MAX_LINE``.
    """
    try:
        body = json.dumps(payload, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise SpoolError(f"spool record is not strict JSON: {error}") from None
    line = b"%08x %08x %b\n" % (zlib.crc32(body), len(body), body)
    if len(line) > MAX_LINE:
        raise SpoolError(
            f"spool record of {len(line)} bytes: at most {MAX_LINE} are allowed. "
            "Write large data to a file and record it as an artifact"
        )
    return line


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not strict JSON")


def decode(line: bytes) -> dict[str, Any]:
    """The payload of a line, newline excluded.

    Raises:
        SpoolError: length, checksum or JSON do not hold.
    """
    head = _HEAD.match(line)
    if head is None:
        raise SpoolError("no checksum and length at the start of the line")
    body = line[head.end() :]
    if len(body) != int(head[2], 16):
        raise SpoolError(f"length {len(body)}, recorded {int(head[2], 16)}")
    if zlib.crc32(body) != int(head[1], 16):
        raise SpoolError("checksum does not match")
    try:
        payload = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise SpoolError(f"not strict JSON: {error}") from None
    if not isinstance(payload, dict):
        raise SpoolError(f"expected a JSON object, got {type(payload).__name__}")
    return payload


def read_chunk(path: Path, offset: int = 0, max_bytes: int = 1 << 20) -> Chunk:
    """The lines that start at ``offset``, up to about ``max_bytes`` of them.

    A missing file is an empty one. A last line without a newline is left for a later call,
    because its writer may still be writing it.

    Raises:
        SpoolError: the operating system cannot read the file.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(max_bytes)
            if len(data) == max_bytes and b"\n" not in data:
                data += file.read(max(0, MAX_LINE - max_bytes))
    except FileNotFoundError:
        return Chunk((), (), offset)
    except OSError as error:
        raise SpoolError(f"{path}: cannot be read: {error.strerror}") from error
    whole = data.rfind(b"\n") + 1
    if whole == 0 and len(data) >= MAX_LINE:
        reason = f"no newline in {len(data)} bytes"
        return Chunk((), ((offset, reason),), offset + len(data))
    lines, damaged, start = [], [], offset
    for raw in data[:whole].split(b"\n")[:-1]:
        end = start + len(raw) + 1
        try:
            lines.append(Line(start, end, decode(raw)))
        except SpoolError as error:
            damaged.append((start, str(error)))
        start = end
    return Chunk(tuple(lines), tuple(damaged), offset + whole)


class LineWriter:
    """Appends lines to one file; every append is on disk when it returns.

    The file is opened for each append and locked meanwhile, so that nothing stays open when a
    trial is abandoned, and a second writer (an orphan of a killed driver, say) can neither tear a
    line nor go unnoticed: its lines are shown to ``seen`` before the next append.

    Args:
        path: the file; made, with its folder, by the first append.
        seen: called with the payload of every line that is in the file already.

    Raises:
        SpoolError: an existing file cannot be read.
    """

    def __init__(self, path: Path, seen: Callable[[Mapping[str, Any]], None]) -> None:
        self.path = path
        self._seen = seen
        self._end = 0
        self._placed = False
        self._catch_up()

    def _catch_up(self) -> None:
        while True:
            chunk = read_chunk(self.path, self._end)
            for offset, reason in chunk.damaged:
                _log.warning("%s: damaged line at byte %d skipped: %s", self.path, offset, reason)
            for line in chunk.lines:
                self._seen(line.payload)
            if chunk.end == self._end:
                return
            self._end = chunk.end

    def append(self, payload: Mapping[str, Any], known: Callable[[], bool] | None = None) -> bool:
        """Write one line and force it to disk.

        Args:
            payload: the record.
            known: asked again once other writers' lines have been seen; true skips the write.

        Returns:
            Whether the line was written.

        Raises:
            SpoolError: the payload is unfit, or the disk is full, read-only or gone. The file
                then ends as it did before, and the call can be repeated.
        """
        line = encode(payload)
        try:
            if not self.path.exists():
                self._placed = False
                make_folder(self.path.parent)
            with self.path.open("ab", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not self._placed:  # before the first line, which would be there if this failed
                    sync_folder(self.path.parent)
                    self._placed = True
                self._repair(file)
                if known is not None and known():
                    return False
                self._write(file, line)
        except ResourceError as error:
            cause = error.__cause__ or error  # by which a trial's own open files are told
            raise SpoolError(f"{self.path}: the record cannot be written: {error}") from cause
        except OSError as error:
            raise SpoolError(
                f"{self.path}: the record cannot be written: {error.strerror or error}. "
                "Make space or make the folder writable, then resume"
            ) from error
        self._seen(payload)
        return True

    def _repair(self, file: IO[bytes]) -> None:
        size = os.fstat(file.fileno()).st_size
        if size < self._end:  # replaced or cut by someone: what it holds now is what counts
            _log.warning("%s: shrank from %d to %d bytes", self.path, self._end, size)
            self._end = 0
        if size > self._end:
            self._catch_up()
        if size > self._end:
            _log.warning("%s: %d bytes of an unfinished line cut off", self.path, size - self._end)
            file.truncate(self._end)

    def _write(self, file: IO[bytes], line: bytes) -> None:
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes were written")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(self._end)
            raise
        self._end += len(line)
