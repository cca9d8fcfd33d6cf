"""Which trials stop early: a verdict is a function of the reports that arrived before it.

A report is judged once, when it arrives and before it is stored, and its one durable write holds
the verdict, too (see :meth:`topotune.search.study.store.StudyStore.report`). So nothing lies
between a report and its verdict that a kill could lose, and no old verdict is computed again from
curves that have grown since.

The rules are those of Optuna's SuccessiveHalvingPruner, HyperbandPruner and MedianPruner, which
the tests compare with. Theirs are not used: they write into the study before they answer, and
read all of its trials for every answer. What is held here is folded from the study's curves when
it is opened, and no order of the reports matters to it.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right, insort
from collections.abc import Callable, Mapping

from topotune.config.models import PrunerConfig, SearchConfig

Curve = Mapping[int, float]
"""Epoch to the first objective's value."""


class Pruner(ABC):
    """Judges reports. Values are finite."""

    @abstractmethod
    def stops(self, number: int, curve: Curve, epoch: int, value: float) -> bool:
        """Whether a trial stops at a report. Changes nothing.

        Args:
            number: the trial.
            curve: its reports before this one.
            epoch: of the report.
            value: of the report.
        """

    def reported(self, number: int, before: int, epoch: int, value: float) -> None:  # noqa: B027
        """A report was stored.

        Args:
            number: the trial.
            before: the epoch of its report before this one, 0 for none.
            epoch: of the report.
            value: of the report.
        """

    def completed(self, curve: Curve) -> None:  # noqa: B027
        """A trial with this curve has ended, COMPLETE to Optuna."""


class Never(Pruner):
    """Stops no trial."""

    def stops(self, number: int, curve: Curve, epoch: int, value: float) -> bool:
        """No."""
        return False


class Asha(Pruner):
    """Asynchronous successive halving: at each rung the best one in ``reduction_factor`` goes on.

    Rung k lies at epoch ``min_epochs * reduction_factor ** (rate + k)``.

    Args:
        config: the search's pruner.
        maximize: whether larger values are better.
        rate: rungs that are left out at the beginning.
    """

    def __init__(self, config: PrunerConfig, maximize: bool, rate: int = 0) -> None:
        self._factor, self._sign = config.reduction_factor, 1.0 if maximize else -1.0
        self._first = config.min_epochs * self._factor**rate
        self._rungs: list[list[float]] = []  # each ascending, larger is better

    def stops(self, number: int, curve: Curve, epoch: int, value: float) -> bool:
        """Whether too many others that came to the same rung are better."""
        worth = self._sign * value
        return any(
            len(rung) - bisect_right(rung, worth) >= max((len(rung) + 1) // self._factor, 1)
            for rung in self._reached(max(curve, default=0), epoch)
        )

    def reported(self, number: int, before: int, epoch: int, value: float) -> None:
        """Take part in the rungs that this report has come to."""
        for rung in self._reached(before, epoch):
            insort(rung, self._sign * value)

    def _reached(self, before: int, epoch: int) -> list[list[float]]:
        """The rungs after one epoch up to another."""
        found = []
        index, at = 0, self._first
        while at <= epoch:
            if index == len(self._rungs):
                self._rungs.append([])
            if at > before:
                found.append(self._rungs[index])
            index, at = index + 1, at * self._factor
        return found


class Hyperband(Pruner):
    """Several :class:`Asha` side by side, which spare young trials for longer and longer.

    Args:
        config: the search's pruner.
        maximize: whether larger values are better.
        epochs: of a trial that is not stopped.
        seed: of the search. A trial's bracket follows from it and the trial's number alone, so
            that the same search gives the same trials again, under another name, too.
    """

    def __init__(self, config: PrunerConfig, maximize: bool, epochs: int, seed: int) -> None:
        factor, self._seed = config.reduction_factor, seed
        count = math.floor(math.log(epochs / config.min_epochs, factor)) + 1
        rates = range(count)
        # As many trials a bracket as spend about the same epochs in each.
        self._shares = [
            math.ceil(count * factor ** (count - 1 - rate) / (count - rate)) for rate in rates
        ]
        self._brackets = [Asha(config, maximize, rate) for rate in rates]

    def stops(self, number: int, curve: Curve, epoch: int, value: float) -> bool:
        """As its bracket says."""
        return self._bracket(number).stops(number, curve, epoch, value)

    def reported(self, number: int, before: int, epoch: int, value: float) -> None:
        """Take part in its bracket."""
        self._bracket(number).reported(number, before, epoch, value)

    def _bracket(self, number: int) -> Asha:
        place = zlib.crc32(f"{self._seed}_{number}".encode()) % sum(self._shares)
        for share, bracket in zip(self._shares, self._brackets, strict=True):
            place -= share
            if place < 0:
                return bracket
        raise AssertionError("a place below the sum of all shares lies in one of them")


class Median(Pruner):
    """Stops a trial whose best value so far is worse than the median of completed ones there.

    Args:
        config: the search's pruner.
        maximize: whether larger values are better.
    """

    def __init__(self, config: PrunerConfig, maximize: bool) -> None:
        self._config, self._maximize = config, maximize
        self._completed = 0
        self._values: dict[int, list[float]] = {}  # epoch to completed trials' values, ascending

    def stops(self, number: int, curve: Curve, epoch: int, value: float) -> bool:
        """Whether its best value is worse than the median at this epoch."""
        values = self._values.get(epoch)
        too_early = epoch < self._config.min_epochs
        if not values or too_early or self._completed < self._config.startup_trials:
            return False
        lower, upper = values[(len(values) - 1) // 2], values[len(values) // 2]
        middle = upper - (upper - lower) / 2  # rounded as NumPy's percentile, which Optuna takes
        seen = [value, *curve.values()]
        return max(seen) < middle if self._maximize else min(seen) > middle

    def completed(self, curve: Curve) -> None:
        """Its values count from now on."""
        self._completed += 1
        for epoch, value in curve.items():
            insort(self._values.setdefault(epoch, []), value)


_PRUNERS: dict[str, Callable[[SearchConfig, bool], Pruner]] = {
    "asha": lambda config, maximize: Asha(config.pruner, maximize),
    "hyperband": lambda config, maximize: Hyperband(
        config.pruner, maximize, config.budget.epochs, config.seed
    ),
    "median": lambda config, maximize: Median(config.pruner, maximize),
    "none": lambda config, maximize: Never(),
}


def make_pruner(config: SearchConfig) -> Pruner:
    """A search's pruner, which knows of no report yet."""
    return _PRUNERS[config.pruner.name](config, config.objective[0].direction == "maximize")
