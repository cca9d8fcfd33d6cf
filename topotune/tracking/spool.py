"""What workers and the driver write: the write-ahead spools of a search.

::

    NAME/driver.spool.jsonl        the search itself, and what the driver decides on its trials
    NAME/trials/0007/spool.jsonl   what trial 7 measured

A record is on disk when the call returns, whether or not any server can be reached; the
:class:`~topotune.tracking.shipper.Shipper` sends it on. Nothing here imports mlflow.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topotune.errors import SpoolError
from topotune.records import EpochReport, Outcome, Value
from topotune.redaction import redact
from topotune.tracking.entries import (
    INTERRUPTED,
    OUTCOME_TAG,
    RUNNING,
    Artifact,
    Body,
    End,
    Entry,
    Epoch,
    Metrics,
    Start,
    Tags,
    from_payload,
    to_payload,
    value_text,
)
from topotune.tracking.lines import LineWriter
from topotune.tracking.naming import MAX_TAG, clean_tag

DRIVER_SPOOL = "driver.spool.jsonl"
TRIAL_SPOOL = "spool.jsonl"
_MAX_REASON = 2000
_log = logging.getLogger(__name__)


class _Known:
    """What one run's spool says already."""

    def __init__(self) -> None:
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.epochs: set[int] = set()
        self.points: set[tuple[str, int]] = set()
        self.artifacts: dict[tuple[str, str], str] = {}
        self.started = False
        self.end: tuple[str, str] | None = None

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
                self.points |= {(name, step) for name in values}
            case Artifact(path, folder, digest):
                self.artifacts[path, folder] = digest
            case End(outcome, reason):
                self.end = (outcome, reason)

    def has(self, body: Body) -> bool:
        """Whether recording ``body`` would say nothing new."""
        match body:
            case Start(params, tags):
                known = params.keys() <= self.params.keys() and tags.items() <= self.tags.items()
                return known and self.started and self.end is None
            case Tags(tags):
                return tags.items() <= self.tags.items()
            case Epoch(report):
                return report.epoch in self.epochs
            case Metrics(values, step):
                return all((name, step) in self.points for name in values)
            case Artifact(path, folder, digest):
                return self.artifacts.get((path, folder)) == digest
            case End(outcome, reason):
                return self.end == (outcome, reason)


class _Spool:
    """Appends each new thing once, for one run or several."""

    def __init__(self, path: Path, root: Path) -> None:
        self._path = path
        self._root = root.resolve()
        self._runs: dict[int | None, _Known] = {}
        self._latest = 0
        self._writer = LineWriter(path, self._seen)

    def _seen(self, payload: Mapping[str, Any]) -> None:
        try:
            entry = from_payload(payload)
        except SpoolError as error:
            _log.warning("%s: record skipped: %s", self._path, error)
            return
        self.known(entry.trial).add(entry.body)
        self._latest = max(self._latest, entry.at)

    def _now(self) -> int:
        """Unix milliseconds, after every stamp in the spool: a clock may be set back."""
        return max(now_ms(), self._latest + 1)

    def known(self, trial: int | None) -> _Known:
        return self._runs.setdefault(trial, _Known())

    def put(self, trial: int | None, body: Body) -> None:
        known = self.known(trial)
        if not known.has(body):
            payload = to_payload(Entry(trial, body))
            from_payload(payload)  # what no reader would accept is refused here and not later
            self._writer.append(payload, lambda: known.has(body))

    def start(
        self, trial: int | None, params: Mapping[str, Value], tags: Mapping[str, str]
    ) -> None:
        texts = {name: redact(value_text(value)) for name, value in params.items()}
        first = self.known(trial).params
        fresh = {name: text for name, text in texts.items() if name not in first}
        for name in texts.keys() - fresh.keys():
            if texts[name] != first[name]:
                _log.warning(
                    "%s: parameter %r stays %r, not %r: a run's parameters are fixed",
                    *(self._path, name, first[name], texts[name]),
                )
        whole = {**_safe_tags(tags), OUTCOME_TAG: RUNNING}
        self.put(trial, Start(fresh, whole, self._now()))

    def metrics(self, trial: int | None, values: Mapping[str, float], step: int, at: int) -> None:
        points = self.known(trial).points
        fresh = {name: float(v) for name, v in values.items() if (name, step) not in points}
        if fresh:
            self.put(trial, Metrics(fresh, step, at))

    def tags(self, trial: int | None, tags: Mapping[str, str]) -> None:
        self.put(trial, Tags(_safe_tags(tags), self._now()))

    def artifact(self, trial: int | None, path: Path, folder: str) -> None:
        real = path.resolve()
        if not real.is_relative_to(self._root):
            raise SpoolError(
                f"artifact {path}: lies outside the search folder {self._root}. "
                "Write it there first"
            )
        digest = hashlib.blake2b(digest_size=16)
        try:
            with real.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise SpoolError(f"artifact {path}: cannot be read: {error.strerror}") from error
        name = real.relative_to(self._root).as_posix()
        self.put(trial, Artifact(name, folder, digest.hexdigest(), self._now()))

    def end(self, trial: int | None, outcome: str, reason: str) -> None:
        self.put(trial, End(str(outcome), redact(reason)[:_MAX_REASON], self._now()))


class SpoolTracker:
    """A :class:`~topotune.tracking.base.Tracker` that writes a trial's spool, without any server.

    Opening a spool that exists reads what it holds; repeating that is ignored: an epoch by its
    number, a metric by its name and step, a parameter by its name, an artifact by its path and
    content, start and end where nothing changed.

    Args:
        path: ``SEARCH/trials/NUMBER/spool.jsonl``. One writer a file is meant, but two tear
            nothing and repeat nothing.
        trial: the trial's number.

    Raises:
        SpoolError: from every method: the spool cannot be written (full, read-only or missing
            disk), a path lies outside the search folder, or a value breaks a record's rule
            (a negative step, say).
    """

    def __init__(self, path: Path, trial: int) -> None:
        self._trial = trial
        self._spool = _Spool(path, path.absolute().parents[2])

    def start(self, params: Mapping[str, Value], tags: Mapping[str, str]) -> None:
        """The trial begins, or begins again. The first value of a parameter stands."""
        self._spool.start(self._trial, params, tags)

    def epoch(self, report: EpochReport) -> None:
        """An epoch is finished; a known epoch number is ignored, whatever its values."""
        self._spool.put(self._trial, Epoch(report))

    def metrics(self, values: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        """Values of the trial as a whole; a name is kept once a step."""
        self._spool.metrics(self._trial, values, step, timestamp_ms)

    def artifact(self, path: Path, folder: str = "") -> None:
        """A finished file inside the search folder; recorded again when its content changed."""
        self._spool.artifact(self._trial, path, folder)

    def end(self, outcome: Outcome, reason: str) -> None:
        """How the trial ended, as its worker saw it; the driver's word outranks this one."""
        self._spool.end(self._trial, outcome.value, reason)

    @property
    def epochs(self) -> frozenset[int]:
        """The epochs that are recorded."""
        return frozenset(self._spool.known(self._trial).epochs)


class SearchTracker:
    """The driver's record: the search's own run, and the last word on each trial.

    Args:
        search_folder: the search's folder; the spool is ``driver.spool.jsonl`` in it.

    Raises:
        SpoolError: as for :class:`SpoolTracker`.
    """

    def __init__(self, search_folder: Path) -> None:
        self._spool = _Spool(search_folder / DRIVER_SPOOL, search_folder)

    def start(self, params: Mapping[str, Value], tags: Mapping[str, str]) -> None:
        """The search begins, or is resumed."""
        self._spool.start(None, params, tags)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the search; the newest value of a name wins.

        ``mlflow.note.content`` is the description that MLflow shows as Markdown, cut at 8000
        characters.
        """
        self._spool.tags(None, tags)

    def tag(self, name: str) -> str | None:
        """The newest recorded value of a tag of the search; None where there is none."""
        return self._spool.known(None).tags.get(name)

    def metrics(self, values: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        """Values of the search, such as the best so far with the trial's number as its step."""
        self._spool.metrics(None, values, step, timestamp_ms)

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file of the search; one that is written anew replaces its former content."""
        self._spool.artifact(None, path, folder)

    def end(self, outcome: str, reason: str = "") -> None:
        """The search is over (COMPLETE, FAILED) or was stopped to be resumed (INTERRUPTED)."""
        if outcome not in (Outcome.COMPLETE, Outcome.FAILED, INTERRUPTED):
            raise SpoolError(f"a search ends COMPLETE, FAILED or INTERRUPTED, not {outcome!r}")
        self._spool.end(None, outcome, reason)

    def trial_tags(self, trial: int, tags: Mapping[str, str]) -> None:
        """Tags that the driver gives to a trial."""
        self._spool.tags(trial, tags)

    def trial_metrics(
        self, trial: int, values: Mapping[str, float], step: int, timestamp_ms: int
    ) -> None:
        """Values that only the driver knows of a trial, such as its device seconds."""
        self._spool.metrics(trial, values, step, timestamp_ms)

    def trial_artifact(self, trial: int, path: Path, folder: str = "") -> None:
        """A file that the driver made for a trial, such as its joined trace."""
        self._spool.artifact(trial, path, folder)

    def trial_end(self, trial: int, outcome: Outcome, reason: str) -> None:
        """How the study counts a trial; this outranks what its worker recorded."""
        self._spool.end(trial, outcome.value, reason)


def _safe_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: clean_tag(redact(str(text)[: 4 * MAX_TAG])) for name, text in tags.items()}


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000
