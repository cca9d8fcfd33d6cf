"""Reads and counts all spools of a search as they grow."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from topotune.errors import SpoolError
from topotune.tracking.entries import Entry, from_payload, size
from topotune.tracking.lines import Chunk, read_chunk
from topotune.tracking.spool import DRIVER_SPOOL, TRIAL_SPOOL

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Some records of a spool.

    Attributes:
        entries: (byte offset, record) pairs, in order.
        damaged: lines that are no records; they are skipped.
        last: where the last line starts; ``end`` if there is none or it is damaged.
        end: where to read on.
    """

    entries: tuple[tuple[int, Entry], ...]
    damaged: int
    last: int
    end: int


@dataclass
class Tail:
    """How far a spool has been counted, and what was found."""

    offset: int = 0
    items: int = 0
    damaged: int = 0


def spool_names(folder: Path) -> list[str]:
    """The spools that a search may have, relative to its folder: the trials', then the driver's."""
    try:
        names = os.listdir(folder / "trials")  # noqa: PTH208 - thousands, every two seconds
    except (FileNotFoundError, NotADirectoryError):
        names = []
    numbers = sorted(name for name in names if name.isdecimal())
    return [*(f"trials/{name}/{TRIAL_SPOOL}" for name in numbers), DRIVER_SPOOL]


def _trial(name: str) -> int | None:
    """The trial that a spool belongs to; None for the driver's."""
    return None if name == DRIVER_SPOOL else int(name.split("/")[1])


def read_piece(folder: Path, name: str, offset: int, log: bool = False) -> Piece:
    """About a megabyte of one spool's records.

    Args:
        folder: the search folder.
        name: as :func:`spool_names` gives it.
        offset: where the last piece ended.
        log: whether damaged lines are logged.

    Raises:
        SpoolError: the file cannot be read.
    """
    chunk = read_chunk(folder / name, offset)
    entries, damaged = _parsed(chunk, _trial(name))
    for start, reason in damaged if log else ():
        _log.warning("%s: record at byte %d skipped: %s", folder / name, start, reason)
    whole = bool(chunk.lines) and chunk.lines[-1].end == chunk.end
    last = chunk.lines[-1].start if whole else chunk.end
    return Piece(tuple(entries), len(damaged), last, chunk.end)


def read_all(folder: Path, name: str) -> Iterator[tuple[int, Entry]]:
    """Every record of one spool, a piece in memory at a time."""
    offset = 0
    while (piece := read_piece(folder, name, offset)).end > offset:
        yield from piece.entries
        offset = piece.end


def _parsed(chunk: Chunk, own: int | None) -> tuple[list[tuple[int, Entry]], list[tuple[int, str]]]:
    entries, damaged = [], list(chunk.damaged)
    for line in chunk.lines:
        try:
            entry = from_payload(line.payload)
            if own is not None and entry.trial != own:
                raise SpoolError(f"is about trial {entry.trial}")
            entries.append((line.start, entry))
        except SpoolError as error:
            damaged.append((line.start, str(error)))
    return entries, damaged


def _length(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - a Path costs five times the call itself
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise SpoolError(f"{path}: cannot be read: {error.strerror}") from error


class Tails:
    """Counts what the spools of one search hold; each call reads only what is new.

    A spool that has nothing new costs one ``stat``. Calls from several threads take turns.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tails: dict[str, Tail] = {}
        self._looking = threading.Lock()

    def count(self) -> list[str]:
        """Read on; returns the spools that are shorter than before, counted from their start.

        Raises:
            SpoolError: a file cannot be read.
        """
        with self._looking:
            return [name for name in spool_names(self._folder) if self._read(name)]

    def _read(self, name: str) -> bool:
        """Count one spool on; whether it is shorter than before."""
        tail = self._tails.setdefault(name, Tail())
        length = _length(f"{self._folder}/{name}")
        if length == tail.offset:
            return False
        shrunk = length < tail.offset
        if shrunk:
            tail = self._tails[name] = Tail()
        while (piece := read_piece(self._folder, name, tail.offset, log=True)).end > tail.offset:
            tail.items += sum(size(entry) for _, entry in piece.entries)
            tail.damaged += piece.damaged
            tail.offset = piece.end
        return shrunk

    def ends(self) -> list[tuple[str, int]]:
        """Each spool and the offset up to which it is counted."""
        return [(name, tail.offset) for name, tail in list(self._tails.items())]

    @property
    def items(self) -> int:
        """Items in all spools."""
        return sum(tail.items for tail in list(self._tails.values()))

    @property
    def damaged(self) -> int:
        """Unreadable lines in all spools."""
        return sum(tail.damaged for tail in list(self._tails.values()))
