"""A tracking store that needs no server, and a run's records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from topotune.records import EpochReport, Value
from topotune.tracking.entries import Epoch, Item
from topotune.tracking.outbox import Outbox
from topotune.tracking.store import NewRun, StoredRun


class MemoryStore:
    """A store in memory whose ``log`` fails for some runs."""

    label = "memory"
    experiment_id = "1"

    def __init__(self, failure: Exception | None = None, breaks: Sequence[str] = ()) -> None:
        self.failure, self.breaks = failure, breaks
        self.points: dict[str, set[tuple[str, int]]] = {}
        self.made: list[NewRun] = []

    def experiment_tags(self) -> dict[str, str]:
        return {}

    def tag_experiment(self, tags: Mapping[str, str]) -> None: ...

    def runs(self, search_id: str, trial: int | None = None) -> list[StoredRun]:
        return []

    def parent(self, search_id: str) -> StoredRun | None:
        return None

    def create_run(self, run: NewRun) -> str:
        self.made.append(run)
        return run.name

    def log(self, run_id: str, batch: Sequence[Item]) -> None:
        if run_id in self.breaks and self.failure is not None:
            raise self.failure
        self.points.setdefault(run_id, set()).update((item.key, item.step) for item in batch)

    def log_artifact(self, run_id: str, path: Path, folder: str) -> None: ...

    def log_data(self, run_id: str, name: str, digest: str, rows: str) -> None: ...

    def terminate(self, run_id: str, status: str, end_ms: int) -> None: ...

    def reopen(self, run_id: str) -> None: ...


class Run:
    """The records of one run: a trial's, or under None the search's own."""

    def __init__(self, search: Path, trial: int | None) -> None:
        self._outbox, self._trial = Outbox(search), trial

    def start(self, params: Mapping[str, Value], tags: Mapping[str, str]) -> None:
        self._outbox.start(self._trial, params, tags)

    def epoch(self, report: EpochReport) -> None:
        self._outbox.put(self._trial, Epoch(report))

    def metrics(self, values: Mapping[str, float], step: int, at: int) -> None:
        self._outbox.metrics(self._trial, values, step, at)

    def tags(self, tags: Mapping[str, str]) -> None:
        self._outbox.tags(self._trial, tags)

    def artifact(self, path: Path, folder: str = "") -> None:
        self._outbox.artifact(self._trial, path, folder)

    def end(self, outcome: str, reason: str = "") -> None:
        self._outbox.end(self._trial, outcome, reason)
