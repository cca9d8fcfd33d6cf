"""Compares what a search recorded with what MLflow holds, point by point."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from topotune.tracking.entries import items
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.outbox import read_all
from topotune.tracking.progress import Progress, Refused
from topotune.tracking.store import StoredRun

Points: TypeAlias = dict[str, set[tuple[int, int, str]]]
"""Metric name to (step, Unix milliseconds, value as text): NaN equals itself as text."""


@dataclass(frozen=True)
class StoredCheck:
    """Recorded against stored.

    Attributes:
        recorded: metric points that were recorded, refused ones left out.
        stored: how many of them the store has, with the same step, time and value.
        extra: points that the store has under the same names and that were not recorded.
        runs: runs of this search in the store, its own included, the bin left out.
        duplicates: runs beyond the first of a trial or of the search.
        missing: the trials whose runs lack points; None is the search itself.
    """

    recorded: int
    stored: int
    extra: int
    runs: int
    duplicates: int
    missing: tuple[int | None, ...]

    @property
    def complete(self) -> bool:
        """Whether every recorded point is stored once, each run exists once, nothing is extra."""
        return self.recorded == self.stored and not (self.extra or self.duplicates)


def recorded_points(folder: Path) -> dict[int | None, Points]:
    """The points of each trial that a search folder holds; under None those of the search."""
    found: dict[int | None, Points] = defaultdict(lambda: defaultdict(set))
    refused = Refused(folder)
    for offset, entry in read_all(folder):
        for item in items(entry):
            if item.kind == "metric" and (offset, item.kind, item.key) not in refused:
                point = (item.step, item.at, str(float(item.value)))
                found[entry.trial][item.key].add(point)
    return found


def reconcile(folder: Path, store: MlflowStore, search_id: str) -> StoredCheck:
    """Ask MLflow for the history of every metric that was recorded.

    Empty second runs of a trial, which a time-out during their creation can leave, are put into
    MLflow's bin first.
    """
    groups = _groups(store, search_id)
    known = set(Progress(folder, store.label).runs.values())
    chosen = {}
    for trial, group in groups.items():
        chosen[trial] = next((run for run in group if run.run_id in known), group[0])
        for run in group:
            if run is not chosen[trial] and not run.latest:
                store.client().delete_run(run.run_id)
    runs = sum(map(len, _groups(store, search_id).values()))
    recorded = stored = extra = 0
    missing = []
    for number, points in recorded_points(folder).items():
        here = {key: _history(store, chosen.get(number), key) for key in points}
        total = sum(map(len, points.values()))
        common = sum(len(points[key] & here[key]) for key in points)
        recorded, stored = recorded + total, stored + common
        extra += sum(map(len, here.values())) - common
        if common < total:
            missing.append(number)
    return StoredCheck(recorded, stored, extra, runs, runs - len(chosen), tuple(missing))


def _groups(store: MlflowStore, search_id: str) -> dict[int | None, list[StoredRun]]:
    """The search's runs by trial, the bin left out."""
    groups: dict[int | None, list[StoredRun]] = defaultdict(list)
    for run in store.runs(search_id):
        if not run.deleted:
            groups[run.trial].append(run)
    return groups


def _history(store: MlflowStore, run: StoredRun | None, key: str) -> set[tuple[int, int, str]]:
    if run is None:
        return set()
    history = store.client().get_metric_history(run.run_id, key)
    return {(point.step, point.timestamp, str(float(point.value))) for point in history}
