"""The outbox: all that a search records for MLflow, in one file with one writer.

``NAME/outbox.jsonl`` is a write-ahead log. Only the process that holds the search's lease appends
to it, whether or not any server can be reached; the
:class:`~topotune.tracking.shipper.Shipper` sends it on. Nothing here imports mlflow.

A kill of the process loses nothing. A record is forced to disk before the call returns, but for
what trials report as they train: that is forced at least every second and at the trial's end, until
when its checkpoint holds it, too.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from topotune.errors import OutboxError, ResourceError
from topotune.files import append, make_folder
from topotune.records import Outcome, Value
from topotune.redaction import redact
from topotune.tracking.entries import (
    INTERRUPTED,
    Artifact,
    Body,
    End,
    Entry,
    Epoch,
    Metrics,
    Series,
    Start,
    Tags,
    begun,
    from_payload,
    now_ms,
    safe_tags,
    to_payload,
)
from topotune.tracking.lines import encode, read_chunk

OUTBOX_FILE = "outbox.jsonl"
FORCE_SECONDS = 1.0
_MAX_REASON = 2000
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Some records of an outbox.

    Attributes:
        entries: (byte offset, record) pairs, in order.
        damaged: (byte offset, reason) of lines that are no records; they are skipped.
        last: where the last line starts; ``end`` where it is missing or damaged.
        end: where to read on.
    """

    entries: tuple[tuple[int, Entry], ...]
    damaged: tuple[tuple[int, str], ...]
    last: int
    end: int


def outbox_size(folder: Path) -> int:
    """Bytes of a search's outbox; 0 while it does not exist.

    Raises:
        OutboxError: the file cannot be looked at.
    """
    try:
        return os.stat(f"{folder}/{OUTBOX_FILE}").st_size  # noqa: PTH116 - a Path costs more
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise OutboxError(f"{folder / OUTBOX_FILE}: cannot be read: {error.strerror}") from error


def read_piece(folder: Path, offset: int) -> Piece:
    """About a megabyte of the records of a search's folder, from an offset where a line starts.

    Raises:
        OutboxError: the file cannot be read.
    """
    chunk = read_chunk(folder / OUTBOX_FILE, offset)
    entries, damaged = [], list(chunk.damaged)
    for line in chunk.lines:
        try:
            entries.append((line.start, from_payload(line.payload)))
        except OutboxError as error:
            damaged.append((line.start, str(error)))
    whole = bool(chunk.lines) and chunk.lines[-1].end == chunk.end
    last = chunk.lines[-1].start if whole else chunk.end
    return Piece(tuple(entries), tuple(damaged), last, chunk.end)


def read_pieces(folder: Path, offset: int = 0) -> Iterator[Piece]:
    """All pieces from an offset on, one in memory at a time."""
    while (piece := read_piece(folder, offset)).end > offset:
        yield piece
        offset = piece.end


def read_all(folder: Path) -> Iterator[tuple[int, Entry]]:
    """Every (byte offset, record) of the outbox of a search's folder."""
    return (pair for piece in read_pieces(folder) for pair in piece.entries)


def bodies_of(folder: Path, trial: int | None) -> list[Body]:
    """What is recorded of one trial, or of the search itself."""
    return [entry.body for _, entry in read_all(folder) if entry.trial == trial]


@dataclass
class _Known:
    """What is recorded of one run already."""

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    epochs: set[int] = field(default_factory=set)
    points: set[tuple[str, int]] = field(default_factory=set)
    steps: int = 0
    artifacts: dict[tuple[str, str], str] = field(default_factory=dict)
    started: bool = False
    end: tuple[str, str] | None = None
    latest: int = 0

    def add(self, body: Body) -> None:
        match body:
            case Start(params, tags):
                self.params = {**params, **self.params}
                self.tags |= tags
                self.started, self.end = True, None
            case Tags(tags):
                self.tags |= tags
            case Epoch(report):
                self.epochs.add(report.epoch)
            case Metrics(values, step):
                self.points.update((name, step) for name in values)
            case Series():
                self.steps = max(self.steps, body.last)
            case Artifact(path, folder, digest):
                self.artifacts[path, folder] = digest
            case End(outcome, reason):
                self.end = (outcome, reason)
        self.latest = max(self.latest, body.at)

    def news(self, body: Body) -> Body | None:
        """What recording ``body`` would say that is not known; None for nothing.

        An epoch is known by its number, a metric by its name and step, a parameter by its name,
        series by their last step, an artifact by its path and content; the first value of a
        parameter stands.
        """
        match body:
            case Start(params, tags):
                fresh = {name: text for name, text in params.items() if name not in self.params}
                for name in params.keys() - fresh.keys():
                    if params[name] != self.params[name]:
                        _log.warning(
                            "parameter %r stays %r, not %r: a run's parameters are fixed",
                            *(name, self.params[name], params[name]),
                        )
                known = not fresh and self.started and self.end is None
                if known and tags.items() <= self.tags.items():
                    return None
                return replace(body, params=fresh, at=max(body.at, self.latest + 1))
            case Tags(tags):
                return None if tags.items() <= self.tags.items() else body
            case Epoch(report):
                return None if report.epoch in self.epochs else body
            case Metrics(values, step):
                left = {n: float(v) for n, v in values.items() if (n, step) not in self.points}
                return replace(body, values=left) if left else None
            case Series():
                return None if body.last <= self.steps else body
            case Artifact(path, folder, digest):
                return None if self.artifacts.get((path, folder)) == digest else body
            case End(outcome, reason):
                return None if self.end == (outcome, reason) else body


class Outbox:
    """Appends each new thing once; repeating what is there is ignored. Threads take turns.

    ``trial`` is a trial's number in all methods, None for the search itself.

    Args:
        search_folder: the search's folder.
        fence: called before each append; raises if another driver has taken the search over.

    Raises:
        OutboxError: from every method: the file cannot be read or written (full, read-only or
            missing disk), a path lies outside the search folder, or a value breaks a record's
            rule (a negative step, say). The file then ends as it did before, and the call can be
            repeated.
    """

    def __init__(self, search_folder: Path, fence: Callable[[], None] = lambda: None) -> None:
        self._folder, self._path = search_folder, search_folder / OUTBOX_FILE
        self._fence = fence
        self._writing = threading.RLock()
        self._runs: dict[int | None, _Known] = {}
        self._ended: dict[int, int] = {}
        self._end = self._size = 0  # of its whole lines; of the file
        self._forced = -math.inf
        self._read()

    def _read(self) -> None:
        """Learn what the file holds. Of trials that have ended little is kept: there are many."""
        self._runs.clear()
        self._ended.clear()
        self._end, self._size = 0, outbox_size(self._folder)
        for piece in read_pieces(self._folder):
            for offset, reason in piece.damaged:
                _log.warning("%s: damaged line at byte %d skipped: %s", self._path, offset, reason)
            for _, entry in piece.entries:
                self._runs.setdefault(entry.trial, _Known()).add(entry.body)
            self._end = piece.end
        if torn := self._size - self._end:
            _log.warning("%s: %d bytes of an unfinished line are cut off", self._path, torn)
        for trial in list(self._runs):
            self.forget(trial)

    def forget(self, trial: int | None) -> None:
        """Keep only how a trial has ended, if it has: what is left to record of it is little."""
        with self._writing:
            known = self._runs.get(trial)
            if trial is not None and known is not None and known.end is not None:
                self._ended[trial] = hash(known.end)
                del self._runs[trial]

    def _known(self, trial: int | None) -> _Known:
        known = self._runs.get(trial)
        if known is None:
            known = self._runs[trial] = _Known()
            if trial is not None and self._ended.pop(trial, None) is not None:
                for body in bodies_of(self._folder, trial):
                    known.add(body)
        return known

    def put(self, trial: int | None, *bodies: Body, force: bool = True) -> None:
        """Record what is new of these, in one write.

        Args:
            trial: whose they are.
            bodies: the records.
            force: whether they must be on disk at once.
        """
        with self._writing:
            if outbox_size(self._folder) != self._size:
                self._read()  # cut or replaced: what it holds now is what counts
            known, lines = self._known(trial), b""
            added = []
            for body in bodies:
                fresh = known.news(body)
                if fresh is not None:
                    payload = to_payload(Entry(trial, fresh))
                    from_payload(payload)  # what no reader would accept is refused here
                    lines += encode(payload)
                    added.append(fresh)
            if added:
                self._append(lines, force)
            for fresh in added:
                known.add(fresh)

    def _append(self, lines: bytes, force: bool) -> None:
        self._fence()
        force = force or time.monotonic() - self._forced >= FORCE_SECONDS
        try:
            if self._end == 0:
                make_folder(self._folder)
            append(self._path, lines, self._end, force)
        except ResourceError as error:
            raise OutboxError(f"{self._path}: the record cannot be written: {error}") from error
        except OSError as error:
            raise OutboxError(
                f"{self._path}: the record cannot be written: {error.strerror or error}. "
                "Make space or make the folder writable, then resume"
            ) from error
        if force:
            self._forced = time.monotonic()
        self._end += len(lines)
        self._size = self._end

    def _now(self, trial: int | None) -> int:
        """Unix milliseconds, after every stamp of the run: a clock may be set back."""
        return max(now_ms(), self._known(trial).latest + 1)

    def start(
        self, trial: int | None, params: Mapping[str, Value], tags: Mapping[str, str]
    ) -> None:
        """A run begins, or begins again. The first value of a parameter stands."""
        self.put(trial, begun(params, tags, now_ms()))

    def tags(self, trial: int | None, tags: Mapping[str, str]) -> None:
        """The newest value of a tag wins.

        ``mlflow.note.content`` is the description that MLflow shows as Markdown, cut at 8000
        characters.
        """
        with self._writing:
            self.put(trial, Tags(safe_tags(tags), self._now(trial)))

    def tag(self, name: str) -> str | None:
        """The newest recorded value of a tag of the search; None without one."""
        return self._known(None).tags.get(name)

    def metrics(
        self,
        trial: int | None,
        values: Mapping[str, float],
        step: int,
        at: int,
        force: bool = True,
    ) -> None:
        """Values that belong to no epoch; a name is kept once a step."""
        self.put(trial, Metrics(values, step, at), force=force)

    def artifact(self, trial: int | None, path: Path, folder: str = "") -> None:
        """A finished file inside the search folder; recorded again when its content changed."""
        real, root = path.resolve(), self._folder.resolve()
        if not real.is_relative_to(root):
            raise OutboxError(
                f"artifact {path}: lies outside the search folder {root}. Write it there first"
            )
        try:
            with real.open("rb") as file:
                whole = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        except OSError as error:
            raise OutboxError(f"artifact {path}: cannot be read: {error.strerror}") from error
        name = real.relative_to(root).as_posix()
        with self._writing:
            self.put(trial, Artifact(name, folder, whole.hexdigest(), self._now(trial)))

    def end(self, trial: int | None, outcome: str, reason: str = "", *before: Body) -> None:
        """How a run ended; ``before`` are its last records, written with it.

        A search is over (COMPLETE, FAILED) or was stopped to be resumed (INTERRUPTED).
        """
        if trial is None and outcome not in (Outcome.COMPLETE, Outcome.FAILED, INTERRUPTED):
            raise OutboxError(f"a search ends COMPLETE, FAILED or INTERRUPTED, not {outcome!r}")
        with self._writing:
            last = End(str(outcome), _reason(reason), self._now(trial))
            self.put(trial, *before, last)

    def has_end(self, trial: int, outcome: str, reason: str) -> bool:
        """Whether it is recorded that a trial ended so."""
        known = self._runs.get(trial)
        end = (str(outcome), _reason(reason))
        return self._ended.get(trial) == hash(end) if known is None else known.end == end


def _reason(text: str) -> str:
    return redact(text)[:_MAX_REASON]
