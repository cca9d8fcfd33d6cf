"""The outbox's file format: one checked line a record, read whatever its state.

A line is ``crc32 length payload\\n``: eight hexadecimal digits of the payload's CRC-32, eight of
its length in bytes, and the payload as strict JSON without raw newlines. A crash in mid-write
leaves a tail without a newline, which readers leave alone and the next writer cuts off; a line
whose check fails is reported and skipped, and the next newline is where reading goes on.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from topotune.errors import OutboxError

MAX_LINE = 1 << 23
"""Bytes of the longest line that is written or believed."""

_HEAD = re.compile(rb"([0-9a-f]{8}) ([0-9a-f]{8}) ")


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
        OutboxError: it is not strict JSON, or longer than ``MAX_LINE``.
    """
    try:
        body = json.dumps(payload, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise OutboxError(f"record is not strict JSON: {error}") from None
    line = b"%08x %08x %b\n" % (zlib.crc32(body), len(body), body)
    if len(line) > MAX_LINE:
        raise OutboxError(
            f"record of {len(line)} bytes: at most {MAX_LINE} are allowed. "
            "Write large data to a file and record it as an artifact"
        )
    return line


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not strict JSON")


def decode(line: bytes) -> dict[str, Any]:
    """The payload of a line, newline excluded.

    Raises:
        OutboxError: length, checksum or JSON do not hold.
    """
    head = _HEAD.match(line)
    if head is None:
        raise OutboxError("no checksum and length at the start of the line")
    body = line[head.end() :]
    if len(body) != int(head[2], 16):
        raise OutboxError(f"length {len(body)}, recorded {int(head[2], 16)}")
    if zlib.crc32(body) != int(head[1], 16):
        raise OutboxError("checksum does not match")
    try:
        payload = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise OutboxError(f"not strict JSON: {error}") from None
    if not isinstance(payload, dict):
        raise OutboxError(f"expected a JSON object, got {type(payload).__name__}")
    return payload


def read_chunk(path: Path, offset: int = 0, max_bytes: int = 1 << 20) -> Chunk:
    """The lines that start at ``offset``, up to about ``max_bytes`` of them.

    A missing file is an empty one. A last line without a newline is left for a later call,
    because its writer may still be writing it.

    Raises:
        OutboxError: the operating system cannot read the file.
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
        raise OutboxError(f"{path}: cannot be read: {error.strerror}") from error
    whole = data.rfind(b"\n") + 1
    if whole == 0 and len(data) >= MAX_LINE:
        reason = f"no newline in {len(data)} bytes"
        return Chunk((), ((offset, reason),), offset + len(data))
    lines, damaged, start = [], [], offset
    for raw in data[:whole].split(b"\n")[:-1]:
        end = start + len(raw) + 1
        try:
            lines.append(Line(start, end, decode(raw)))
        except OutboxError as error:
            damaged.append((start, str(error)))
        start = end
    return Chunk(tuple(lines), tuple(damaged), offset + whole)
