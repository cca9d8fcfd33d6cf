"""Compares what the spools hold with what the store holds, point by point."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from topotune.tracking.entries import Entry, items
from topotune.tracking.progress import Refused
from topotune.tracking.spool import DRIVER_SPOOL
from topotune.tracking.store import Store, StoredRun
from topotune.tracking.tails import read_all, spool_names

_log = logging.getLogger(__name__)

_Points: TypeAlias = dict[str, set[tuple[int, int, str]]]
"""Metric name to (step, Unix milliseconds, value as text): NaN equals itself as text."""


@dataclass(frozen=True)
class StoredCheck:
    """Recorded against stored.

    Attributes:
        recorded: metric points in the spools, refused ones left out.
        stored: how many of them the store has, with the same step, time and value.
        extra: points that the store has under the same names and that no spool holds.
        runs: runs of this search in the store, its own included, the bin left out.
        duplicates: runs beyond the first of a trial or of the search.
        missing: ``trial 7`` or ``search`` for each run that lacks points.
    """

    recorded: int
    stored: int
    extra: int
    runs: int
    duplicates: int
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every recorded point is stored once, each run exists once, nothing is extra."""
        return self.recorded == self.stored and not (self.extra or self.duplicates)


def check_stored(
    folder: Path, store: Store, search_id: str, ids: Mapping[str, str], refused: Refused
) -> StoredCheck:
    """Ask the store for the history of every metric that the spools name.

    Args:
        folder: the search folder.
        store: the store.
        search_id: whose runs.
        ids: the known run ids, by trial number or "search".
        refused: items that are not expected in the store.

    Raises:
        StoreOfflineError: the store cannot be asked now.
        SpoolError: a spool cannot be read.
    """
    active = [run for run in store.runs(search_id) if not run.deleted]
    chosen = {trial: _keep(group, ids) for trial, group in _groups(active).items()}
    driver: dict[int | None, _Points] = defaultdict(lambda: defaultdict(set))
    for offset, entry in read_all(folder, DRIVER_SPOOL):
        _add(driver[entry.trial], DRIVER_SPOOL, offset, entry, refused)
    recorded = stored = extra = 0
    missing = []
    for name in spool_names(folder):
        trial = None if name == DRIVER_SPOOL else int(name.split("/")[1])
        points = driver.pop(trial, defaultdict(set))
        if trial is not None:
            for offset, entry in read_all(folder, name):
                _add(points, name, offset, entry, refused)
        if name == DRIVER_SPOOL:  # it comes last: what is left belongs to trials without a spool
            rest = [(None, points), *driver.items()]
        else:
            rest = [(trial, points)]
        for number, expected in rest:
            run = chosen.get(number)
            here = _history(store, run, expected) if run else {}
            total = sum(map(len, expected.values()))
            common = sum(len(p & here.get(key, set())) for key, p in expected.items())
            recorded, stored = recorded + total, stored + common
            extra += sum(map(len, here.values())) - common
            if common < total:
                missing.append("search" if number is None else f"trial {number}")
    return StoredCheck(
        recorded, stored, extra, len(active), len(active) - len(chosen), tuple(missing)
    )


def drop_duplicates(store: Store, search_id: str, ids: Mapping[str, str]) -> int:
    """Put second runs that hold no metric into MLflow's bin; returns how many."""
    dropped = 0
    active = [run for run in store.runs(search_id) if not run.deleted]
    for group in _groups(active).values():
        keep = _keep(group, ids)
        for run in group:
            if run is not keep and not run.latest:
                _log.warning("run %s: an empty second run of %s, deleted", run.run_id, keep.run_id)
                store.delete_run(run.run_id)
                dropped += 1
    return dropped


def _groups(runs: list[StoredRun]) -> dict[int | None, list[StoredRun]]:
    groups: dict[int | None, list[StoredRun]] = defaultdict(list)
    for run in runs:
        groups[run.trial].append(run)
    return groups


def _keep(group: list[StoredRun], ids: Mapping[str, str]) -> StoredRun:
    """The run that is filled: the known one, else the one that the next shipper would find."""
    return next((run for run in group if run.run_id in ids.values()), group[0])


def _add(points: _Points, spool: str, offset: int, entry: Entry, refused: Refused) -> None:
    for item in items(entry):
        if item.kind == "metric" and (spool, offset, item.kind, item.key) not in refused:
            points.setdefault(item.key, set()).add((item.step, item.at, str(float(item.value))))


def _history(store: Store, run: StoredRun, expected: _Points) -> _Points:
    return {
        key: {(step, at, str(float(value))) for step, at, value in store.history(run.run_id, key)}
        for key in expected
    }
