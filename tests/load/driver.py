"""Searches over almost nothing: what the driver itself costs, and whether that grows.

``python -m tests.load.driver TRIALS...`` measures searches of so many trials and prints JSON.

The searches are real: Ray, the study, the outbox and MLflow; only the training takes no time. The
largest comes first, in this process, so that its memory is that of a fresh driver.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.table import Table

from tests.faults.task import IMPORT_PATH
from topotune.config.file import parse_search
from topotune.records import TrialSummary
from topotune.search import driver
from topotune.search.drive.recorder import leaderboard
from topotune.search.place.folder import SearchFolder
from topotune.search.view import SilentListener

MARKS = (100, 125, 250, 500, 1000)
"""Trials after which the driver is looked at, and at the last one."""
SIZES = (125, 250, 500, 1000)
"""Searches of these many trials are asked for their status, leaderboard and resumed."""


@dataclass(frozen=True)
class Mark:
    """The driver after so many trials.

    Attributes:
        trials: trials that have ended.
        seconds: since the first trial ended.
        rate: trials a second since the mark before.
        memory_mb: resident memory of the driver's process.
        cpu_ms: CPU time of the driver's process a trial since the mark before.
    """

    trials: int
    seconds: float
    rate: float
    memory_mb: float
    cpu_ms: float


@dataclass(frozen=True)
class Size:
    """A finished search of so many trials.

    Attributes:
        trials: its trials.
        search: seconds from the first trial's end to the last one's.
        close: seconds from the last trial's end to the end of the command's work.
        status: seconds of ``topotune status NAME --json``, a process of its own.
        board: seconds to make its leaderboard, in this process.
        resume: seconds of ``topotune resume NAME``, which finds nothing left to do.
        stored: what the search said of MLflow in the end.
    """

    trials: int
    search: float
    close: float
    status: float
    board: float
    resume: float
    stored: str


@dataclass(frozen=True)
class Load:
    """All that was measured; ``concurrency`` trials ran at once."""

    concurrency: int
    marks: tuple[Mark, ...] = field(default=())
    sizes: tuple[Size, ...] = field(default=())

    @property
    def growth_kb(self) -> float:
        """Memory that the driver gained a trial between the first mark and the last, in KiB."""
        first, last = self.marks[0], self.marks[-1]
        return 1024 * (last.memory_mb - first.memory_mb) / max(last.trials - first.trials, 1)


class _Watch(SilentListener):
    """Takes the marks while a search runs."""

    def __init__(self, trials: int) -> None:
        self.marks: list[Mark] = []
        self._wanted = {*MARKS, trials}
        self.first = self.last = 0.0
        self._ended = 0
        self._process = psutil.Process()
        self._before = (0.0, 0, 0.0)  # time, trials and CPU seconds at the mark before

    def ended(self, trial: TrialSummary) -> None:
        self._ended += 1
        now = self.last = time.perf_counter()
        if self._ended == 1:
            self.first = now
            self._before = (now, 1, self._cpu())
        elif self._ended in self._wanted:
            then, trials, cpu = self._before
            count = self._ended - trials
            self._before = (now, self._ended, self._cpu())
            memory = self._process.memory_info().rss / 2**20
            self.marks.append(
                Mark(
                    self._ended,
                    now - self.first,
                    count / (now - then),
                    memory,
                    1e3 * (self._before[2] - cpu) / count,
                )
            )

    def _cpu(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def run(sizes: Sequence[int], concurrency: int = 8) -> Load:
    """Measure, the largest search first."""
    # One slot a trial, whatever the machine has: the trials hardly compute.
    os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": concurrency})
    marks: list[Mark] = []
    measured = []
    with tempfile.TemporaryDirectory(prefix="topotune-load-") as scratch:
        for trials in sorted(sizes, reverse=True):
            watch = _Watch(trials)
            measured.append(_measure(Path(scratch), trials, watch))
            marks = marks or watch.marks
    return Load(concurrency, tuple(marks), tuple(reversed(measured)))


def _measure(results: Path, trials: int, watch: _Watch) -> Size:
    name = f"load-{trials}"
    data = {
        "name": name,
        "task": IMPORT_PATH,
        "method": "adam",
        "space": {"lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}},
        "objective": {"metric": "val_accuracy", "direction": "maximize"},
        "budget": {"trials": trials, "epochs": 1},
        "train": {"batch_size": 160},
        "sampler": "random",
        "pruner": "none",
        "overhead": {"blocks": 0},
    }
    report = driver.start(parse_search(data, name, {}), json.dumps(data), results, watch)
    closed = time.perf_counter() - watch.last
    folder = SearchFolder.open(results, name)
    began = time.perf_counter()
    board = leaderboard(folder, report.config)
    made = time.perf_counter() - began
    assert len(board.trials) == trials
    return Size(
        trials=trials,
        search=watch.last - watch.first,
        close=closed,
        status=_command(results, "status", name, "--json"),
        board=made,
        resume=_command(results, "resume", name, "--json"),
        stored=report.tracking,
    )


def _command(results: Path, *arguments: str) -> float:
    command = [sys.executable, "-m", "topotune", *arguments, "--results-dir", str(results)]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def tables(load: Load) -> tuple[Table, Table]:
    """The measurements as two tables."""
    marks = Table(
        title=f"The driver while {load.marks[-1].trials} trials run, {load.concurrency} at once; "
        f"memory grows by {load.growth_kb:.0f} KiB a trial",
        title_justify="left",
    )
    for heading in ("after trial", "s", "trials/s", "driver CPU ms a trial", "driver memory, MB"):
        marks.add_column(heading, justify="right")
    for mark in load.marks:
        marks.add_row(
            *(str(mark.trials), f"{mark.seconds:.0f}", f"{mark.rate:.1f}"),
            *(f"{mark.cpu_ms:.0f}", f"{mark.memory_mb:.0f}"),
        )
    sizes = Table(title="Whole searches, in seconds", title_justify="left")
    for heading in ("trials", "search", "closing", "status", "leaderboard", "resume", "MLflow"):
        sizes.add_column(heading, justify="left" if heading == "MLflow" else "right")
    for size in load.sizes:
        sizes.add_row(
            *(str(size.trials), f"{size.search:.0f}", f"{size.close:.1f}", f"{size.status:.1f}"),
            *(f"{size.board:.2f}", f"{size.resume:.1f}", size.stored.removeprefix("MLflow: ")),
        )
    return marks, sizes


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(run([int(trials) for trials in sys.argv[1:]]))))
