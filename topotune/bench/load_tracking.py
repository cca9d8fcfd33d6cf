"""How tracking carries a large search: many children in one parent run, and a long step trace.

Cost a child must not grow with the number of children; both parts run in a temporary folder and
an embedded MLflow store of their own.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import psutil
from rich.table import Table

from topotune.bench.console import wide_console
from topotune.records import EpochReport, Outcome
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.shipper import Shipper
from topotune.tracking.spool import TRIAL_SPOOL, SearchTracker, SpoolTracker

CHILDREN = (125, 250, 500)
POINTS = 1_000_000
_EPOCHS, _METRICS = 5, 12


@dataclass(frozen=True)
class ShippingRecord:
    """What a search of ``children`` trials costs to ship and to check.

    Attributes:
        children: trials, each with a run of its own under the search's.
        items: metric points, parameters, tags and ends that were shipped.
        stored: metric points that the store was found to hold, of ``recorded``.
        recorded: metric points in the spools.
        seconds: to ship all.
        last_tenth: seconds a child for the last tenth of the children over that of the first.
        idle_ms: milliseconds of a look that finds nothing new.
        reconcile_seconds: to compare every point with the store.
        memory_mb: growth of the process's resident memory while it shipped, megabytes.
    """

    children: int
    items: int
    stored: int
    recorded: int
    seconds: float
    last_tenth: float
    idle_ms: float
    reconcile_seconds: float
    memory_mb: float

    @property
    def items_per_second(self) -> float:
        """Items shipped a second."""
        return self.items / self.seconds

    @property
    def seconds_per_child(self) -> float:
        """Seconds to ship one trial."""
        return self.seconds / self.children


@dataclass(frozen=True)
class TraceRecord:
    """What a step trace of ``points`` optimizer steps costs.

    Attributes:
        points: steps, of four series each.
        size_mb: of ``trace.npz``, megabytes.
        write_seconds: the epochs' own files, during training.
        join_seconds: into one file, after it.
        plot_seconds: its picture.
        upload_seconds: file and picture into the embedded store.
    """

    points: int
    size_mb: float
    write_seconds: float
    join_seconds: float
    plot_seconds: float
    upload_seconds: float


Record: TypeAlias = ShippingRecord | TraceRecord


def run(
    children: Sequence[int] = CHILDREN,
    points: int = POINTS,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Record]:
    """Measure both.

    Args:
        children: how many trials, one record each.
        points: steps of the trace.
        tell: told, in a line, what is measured now.
    """
    records: list[Record] = []
    for count in children:
        tell(f"shipping {count} children")
        with tempfile.TemporaryDirectory(prefix="topotune-load-") as folder:
            records.append(_shipping(Path(folder), count))
    tell(f"a trace of {points} points")
    with tempfile.TemporaryDirectory(prefix="topotune-load-") as folder:
        records.append(_trace(Path(folder), points))
    return records


def print_records(records: Sequence[Record]) -> None:
    """The records as two tables."""
    out = wide_console()
    ships = Table(title="Trials shipped into one parent run", title_justify="left")
    for heading in (
        *("trials", "items", "points stored", "s", "ms a trial", "last tenth / first"),
        *("idle look, ms", "reconcile, s", "memory, MB"),
    ):
        ships.add_column(heading, justify="right")
    traces = Table(title="A step trace, in seconds", title_justify="left")
    for heading in ("steps", "file, MB", "write", "join", "plot", "upload"):
        traces.add_column(heading, justify="right")
    for one in records:
        if isinstance(one, ShippingRecord):
            ships.add_row(
                *(str(one.children), str(one.items), f"{one.stored} of {one.recorded}"),
                *(f"{one.seconds:.1f}", f"{1e3 * one.seconds_per_child:.0f}"),
                *(f"{one.last_tenth:.2f}", f"{one.idle_ms:.1f}"),
                *(f"{one.reconcile_seconds:.1f}", f"{one.memory_mb:.0f}"),
            )
        else:
            traces.add_row(
                *(str(one.points), f"{one.size_mb:.1f}", f"{one.write_seconds:.1f}"),
                *(f"{one.join_seconds:.1f}", f"{one.plot_seconds:.1f}"),
                f"{one.upload_seconds:.1f}",
            )
    out.print(ships)
    out.print(traces)


def _store(results: Path) -> MlflowStore:
    store = MlflowStore.embedded(results)
    store.ping()  # made before the clock runs
    return store


def _shipping(results: Path, children: int) -> ShippingRecord:
    search = results / "search"
    store = _store(results)
    driver = SearchTracker(search)
    driver.start({"method": "adam"}, {})
    shipper = Shipper(search, store, "load", "search")
    shipper.ship_once()
    before, pace = psutil.Process().memory_info().rss, []
    tenth = max(children // 10, 1)
    for first in range(0, children, tenth):
        numbers = range(first, min(first + tenth, children))
        for number in numbers:
            _record_trial(search, driver, number)
        began = time.perf_counter()
        shipper.ship_once()
        pace.append((time.perf_counter() - began, len(numbers)))
    began = time.perf_counter()
    for _ in range(10):
        shipper.ship_once()
    idle = (time.perf_counter() - began) / 10
    grown = psutil.Process().memory_info().rss - before
    began = time.perf_counter()
    check = shipper.reconcile()
    reconcile = time.perf_counter() - began
    count = shipper.close(0.0)
    whole = [seconds / size for seconds, size in pace if size == tenth]
    return ShippingRecord(
        children=children,
        items=count.shipped,
        stored=check.stored,
        recorded=check.recorded,
        seconds=sum(seconds for seconds, _ in pace),
        last_tenth=whole[-1] / whole[0],
        idle_ms=1e3 * idle,
        reconcile_seconds=reconcile,
        memory_mb=grown / 1e6,
    )


def _record_trial(search: Path, driver: SearchTracker, number: int) -> None:
    """What a worker and the driver record of one short trial."""
    trial = SpoolTracker(search / "trials" / f"{number:04d}" / TRIAL_SPOOL, number)
    trial.start({f"p{i}": i / 7 for i in range(8)}, {"device": "cpu", "seed": str(number)})
    for epoch in range(1, _EPOCHS + 1):
        values = {f"metric_{i}": number / (epoch + i) for i in range(_METRICS)}
        trial.epoch(EpochReport(epoch, 100 * epoch, values, 0.1, 1_700_000_000_000 + epoch))
    driver.trial_metrics(number, {"device_seconds": 0.5}, 0, 1_700_000_000_000)
    driver.trial_end(number, Outcome.COMPLETE, "")


def _trace(results: Path, points: int) -> TraceRecord:
    from topotune.results.trace import plot_trace
    from topotune.train.trace import TRACE_FILE, StepTrace, step_traces

    trial = results / "search" / "trials" / "0000"
    trial.mkdir(parents=True)
    epochs, size = 10, points // 10
    noise = np.random.default_rng(0)
    marks = [time.perf_counter()]
    for epoch in range(epochs):
        steps = np.arange(1 + epoch * size, 1 + (epoch + 1) * size, dtype=np.float64)
        names = ("loss", "grad_norm", "energy")
        block = StepTrace()
        block.append({"step": steps, **{name: noise.lognormal(size=size) for name in names}})
        step_traces(trial).write(epoch + 1, block.columns())
    marks.append(time.perf_counter())
    joined, picture = trial / TRACE_FILE, trial / "trace.png"
    step_traces(trial).join(epochs, joined)
    marks.append(time.perf_counter())
    plot_trace(joined, picture, "trace")
    marks.append(time.perf_counter())
    store = _store(results)
    driver = SearchTracker(results / "search")
    driver.start({}, {})
    shipper = Shipper(results / "search", store, "load", "search")
    shipper.ship_once()
    driver.trial_artifact(0, joined)
    driver.trial_artifact(0, picture)
    began = time.perf_counter()
    shipper.ship_once()
    upload = time.perf_counter() - began
    write, join, plot = (after - first for first, after in itertools.pairwise(marks))
    return TraceRecord(epochs * size, joined.stat().st_size / 1e6, write, join, plot, upload)
