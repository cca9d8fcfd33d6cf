"""How tracking carries a large search: many children in one parent run, and a long step trace.

Cost a child must not grow with the number of children; both parts run in a temporary folder and
an embedded MLflow store of their own.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from rich.table import Table

from tests.reconcile import reconcile
from topotune.records import EpochReport, Outcome
from topotune.results.trace import plot_trace
from topotune.tracking.entries import Epoch, Metrics
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.outbox import Outbox
from topotune.tracking.shipper import Shipper
from topotune.train.trace import TRACE_FILE, StepTrace, step_traces

_EPOCHS, _METRICS = 5, 12


@dataclass(frozen=True)
class ShippingRecord:
    """What a search of ``children`` trials costs to ship and to check.

    Attributes:
        children: trials, each with a run of its own under the search's.
        items: metric points, parameters, tags and ends that were shipped.
        stored: metric points that the store was found to hold, of ``recorded``.
        recorded: metric points in the outbox.
        seconds: to ship all.
        last_tenth: seconds a child for the last tenth of the children over that of the first.
        idle_ms: milliseconds of a look that finds nothing new.
        memory_mb: growth of the process's resident memory while it shipped, megabytes.
    """

    children: int
    items: int
    stored: int
    recorded: int
    seconds: float
    last_tenth: float
    idle_ms: float
    memory_mb: float

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


def shipping_table(records: Sequence[ShippingRecord]) -> Table:
    """What shipping cost, by the number of trials."""
    out = Table(title="Trials shipped into one parent run", title_justify="left")
    for heading in (
        *("trials", "items", "points stored", "s", "ms a trial", "last tenth / first"),
        *("idle look, ms", "memory, MB"),
    ):
        out.add_column(heading, justify="right")
    for one in records:
        out.add_row(
            *(str(one.children), str(one.items), f"{one.stored} of {one.recorded}"),
            *(f"{one.seconds:.1f}", f"{1e3 * one.seconds_per_child:.0f}"),
            *(f"{one.last_tenth:.2f}", f"{one.idle_ms:.1f}", f"{one.memory_mb:.0f}"),
        )
    return out


def trace_table(one: TraceRecord) -> Table:
    """What a step trace cost."""
    out = Table(title="A step trace, in seconds", title_justify="left")
    for heading in ("steps", "file, MB", "write", "join", "plot", "upload"):
        out.add_column(heading, justify="right")
    out.add_row(
        *(str(one.points), f"{one.size_mb:.1f}", f"{one.write_seconds:.1f}"),
        *(f"{one.join_seconds:.1f}", f"{one.plot_seconds:.1f}", f"{one.upload_seconds:.1f}"),
    )
    return out


def _store(results: Path) -> MlflowStore:
    results.mkdir(exist_ok=True)
    store = MlflowStore.embedded(results)
    store.ping()  # made before the clock runs
    return store


def ship(results: Path, children: int) -> ShippingRecord:
    """Ship so many trials, into an embedded store in the same folder."""
    search = results / "search"
    store = _store(results)
    outbox = Outbox(search)
    outbox.start(None, {"method": "adam"}, {})
    shipper = Shipper(search, store, "load", "search")
    shipper.ship_once()
    before, pace = psutil.Process().memory_info().rss, []
    tenth = max(children // 10, 1)
    for first in range(0, children, tenth):
        numbers = range(first, min(first + tenth, children))
        for number in numbers:
            _record_trial(outbox, number)
        began = time.perf_counter()
        shipper.ship_once()
        pace.append((time.perf_counter() - began, len(numbers)))
    began = time.perf_counter()
    for _ in range(10):
        shipper.ship_once()
    idle = (time.perf_counter() - began) / 10
    grown = psutil.Process().memory_info().rss - before
    check = reconcile(search, store, "load")
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
        memory_mb=grown / 1e6,
    )


def _record_trial(outbox: Outbox, number: int) -> None:
    """What is recorded of one short trial."""
    outbox.start(number, {f"p{i}": i / 7 for i in range(8)}, {"device": "cpu", "seed": str(number)})
    for epoch in range(1, _EPOCHS + 1):
        values = {f"metric_{i}": number / (epoch + i) for i in range(_METRICS)}
        report = EpochReport(epoch, 100 * epoch, values, 0.1, 1_700_000_000_000 + epoch)
        outbox.put(number, Epoch(report))
    spent = Metrics({"device_seconds": 0.5}, 0, 1_700_000_000_000)
    outbox.end(number, Outcome.COMPLETE, "", spent)
    outbox.forget(number)


def trace(results: Path, points: int) -> TraceRecord:
    """Write, join, draw and upload a step trace."""
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
    outbox = Outbox(results / "search")
    outbox.start(None, {}, {})
    shipper = Shipper(results / "search", store, "load", "search")
    shipper.ship_once()
    outbox.artifact(0, joined)
    outbox.artifact(0, picture)
    began = time.perf_counter()
    shipper.ship_once()
    upload = time.perf_counter() - began
    write, join, plot = (after - first for first, after in itertools.pairwise(marks))
    return TraceRecord(epochs * size, joined.stat().st_size / 1e6, write, join, plot, upload)
