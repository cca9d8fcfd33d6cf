"""The arithmetic of ``bench scaling``: what the slots' clocks and the processes' CPU times say."""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Epoch:
    """An epoch's sleep, in monotonic seconds; ``worker`` is the process that slept."""

    worker: int
    begin: float
    end: float


@dataclass(frozen=True)
class Sample:
    """CPU seconds that processes had used by a moment (monotonic seconds), by part."""

    at: float
    cpu: Mapping[str, float]


@dataclass(frozen=True)
class Spread:
    """A median with what lies around it: the quartiles, or the least and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def quartiles(cls, values: Sequence[float]) -> Self:
        """Median and quartiles; all the same for a single value."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)

    @classmethod
    def range(cls, values: Sequence[float]) -> Self:
        """Median, least and largest."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Window:
    """The steady state of a run: from when every slot had ended a trial to the last trial's end.

    Attributes:
        begin, end: monotonic seconds.
        trials, epochs: that ended after ``begin``, up to ``end``.
        rate: trials a second: the sum of the slots' own rates, so that it does not matter how the
            trials are divided among the slots or how many were cut off at the edges.
    """

    begin: float
    end: float
    trials: int
    epochs: int
    rate: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.begin


@dataclass(frozen=True)
class Load:
    """What the driver did in a window: its CPU seconds, and what it spent them on."""

    seconds: float
    trials: float
    epochs: float
    cpu: float


@dataclass(frozen=True)
class Cost:
    """CPU seconds of the driver: each second whatever runs, each trial, and each epoch besides."""

    second: float
    trial: float
    epoch: float

    def slots(self, trial_seconds: float, epochs: int, full: float = 1.0) -> float:
        """Slots that one driver can feed with trials of this length.

        Args:
            trial_seconds: of a trial.
            epochs: of a trial.
            full: cores that a driver uses that can do no more; below one where it waits for its
                study and its files.
        """
        return (full - self.second) * trial_seconds / (self.trial + epochs * self.epoch)


def slot_trials(epochs: Sequence[Epoch], per_trial: int) -> list[Epoch]:
    """The last epoch of each trial, of ``per_trial`` epochs each, in the order that they ended.

    Raises:
        ValueError: a worker's epochs are no whole number of trials.
    """
    found = []
    for worker, own in _by_worker(epochs).items():
        if len(own) % per_trial:
            raise ValueError(f"worker {worker} slept {len(own)} epochs, of {per_trial} a trial")
        found += own[per_trial - 1 :: per_trial]
    return sorted(found, key=lambda trial: trial.end)


def pauses(
    epochs: Sequence[Epoch], per_trial: int, since: float
) -> tuple[list[float], list[float]]:
    """Seconds in which a slot did not sleep, of those that began at ``since`` or later: between
    one trial's last epoch and the next one's first, and between two epochs of a trial."""
    between: tuple[list[float], list[float]] = [], []
    for own in _by_worker(epochs).values():
        for index, (before, after) in enumerate(itertools.pairwise(own), start=1):
            if before.end >= since:
                between[index % per_trial != 0].append(after.begin - before.end)
    return between


def _by_worker(epochs: Sequence[Epoch]) -> dict[int, list[Epoch]]:
    found: dict[int, list[Epoch]] = defaultdict(list)
    for epoch in sorted(epochs, key=lambda epoch: epoch.begin):
        found[epoch.worker].append(epoch)
    return found


def steady(epochs: Sequence[Epoch], per_trial: int) -> Window:
    """The steady state of a run.

    Raises:
        ValueError: a slot ended fewer than two trials in it.
    """
    trials = slot_trials(epochs, per_trial)
    ends: dict[int, list[float]] = defaultdict(list)
    for trial in trials:
        ends[trial.worker].append(trial.end)
    begin = max(own[0] for own in ends.values())
    rate = 0.0
    for worker, own in ends.items():
        late = own[bisect.bisect_left(own, begin) :]
        if len(late) < 2:
            raise ValueError(
                f"worker {worker} ended {len(late)} trials after the slowest one to start had "
                "ended its first, too few for a rate: more trials a slot are needed (--trials)"
            )
        rate += (len(late) - 1) / (late[-1] - late[0])
    end = trials[-1].end
    return Window(
        begin=begin,
        end=end,
        trials=sum(begin < trial.end <= end for trial in trials),
        epochs=sum(begin < epoch.end <= end for epoch in epochs),
        rate=rate,
    )


def spent(samples: Sequence[Sample], part: str, begin: float, end: float) -> float:
    """CPU seconds of a part between two moments, straight between the samples around each."""
    at = [sample.at for sample in samples]
    cpu = [sample.cpu[part] for sample in samples]
    return float(np.interp(end, at, cpu) - np.interp(begin, at, cpu))


def fit(loads: Sequence[Load]) -> Cost:
    """The cost that explains the driver's CPU time best, none of its parts below zero (least
    squares of the CPU seconds a second of each run).

    Raises:
        ValueError: the runs do not differ enough to tell the three parts apart.
    """
    rows = np.array([[1.0, one.trials / one.seconds, one.epochs / one.seconds] for one in loads])
    busy = np.array([one.cpu / one.seconds for one in loads])
    if np.linalg.matrix_rank(rows, tol=1e-6) < 3:
        raise ValueError("runs of two numbers of slots and of two numbers of epochs are needed")
    parts = [0, 1, 2]
    cost = np.zeros(3)
    while parts:
        found = np.linalg.lstsq(rows[:, parts], busy, rcond=None)[0]
        if found.min() >= 0:
            cost[parts] = found
            break
        del parts[int(found.argmin())]
    return Cost(*cost.tolist())
