"""How a search scales with its worker slots: trials an hour against the ideal, what the driver
spends on each, and how many slots one driver can feed.

The trials sleep instead of computing, so that a few cores can play many slots and what is measured
is the driver's part. Everything else is real: a Ray cluster of two nodes with a token, ``topotune
search`` as a process of its own, the study, the outbox and MLflow.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topotune.bench.scaling.numbers import Cost, Spread, fit
from topotune.bench.scaling.run import PARTS, Plan, Run, measure
from topotune.bench.shared import Columns, table
from topotune.errors import RunError
from topotune.search.drive.signals import Interrupts
from topotune.settings import STUDY_URI

if TYPE_CHECKING:
    from rich.table import Table

LENGTHS = ((10.0, 5), (60.0, 20), (600.0, 50), (3600.0, 100))
"""Seconds and epochs of the trials that the slots are projected for."""
EPOCHS, SLEEP, TRIALS_A_SLOT = 4, 0.5, 6
"""Of the paced searches; a slot needs three trials at least for a steady state."""
SATURATING_TRIALS = 60
_RUNS_TO_TRUST = 6
"""Twice as many as the cost has parts."""
_TRIALS_A_FULL_SLOT = 12
"""At least; the first slots that work have used up many before the last one does."""


@dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
        slots: of the searches whose trials sleep.
        saturating: slots of those whose trials do not.
        rounds: times that each of ``slots`` is run, alternating.
        saturating_rounds: the same of ``saturating``, which come last.
        epochs, sleep: epochs of a paced trial, and seconds of each.
        trials_a_slot: trials of a paced search for each of its slots.
        saturating_trials: trials of a saturating search, of one epoch each; more where it has
            many slots.
    """

    slots: tuple[int, ...] = (1, 2, 4)
    saturating: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 2
    saturating_rounds: int = 1
    epochs: int = EPOCHS
    sleep: float = SLEEP
    trials_a_slot: int = TRIALS_A_SLOT
    saturating_trials: int = SATURATING_TRIALS

    def plans(self) -> list[Plan]:
        """The searches in their order."""
        paced = [Plan(n, n * self.trials_a_slot, self.epochs, self.sleep) for n in self.slots]
        full = [
            Plan(n, max(self.saturating_trials, _TRIALS_A_FULL_SLOT * n), 1, 0.0)
            for n in self.saturating
        ]
        return paced * self.rounds + full * self.saturating_rounds


QUICK = Options(
    slots=(1, 2), saturating=(4,), rounds=1, sleep=0.2, trials_a_slot=8, saturating_trials=48
)


@dataclass(frozen=True)
class Report:
    """All that was measured.

    Attributes:
        options: what was run.
        cores: of the machine.
        runs: one a search.
    """

    options: Options
    cores: int
    runs: tuple[Run, ...]

    @property
    def cost(self) -> Cost:
        """What the driver's CPU time went on, by all runs together."""
        return fit([run.driver_load for run in self.runs])

    @property
    def ceiling(self) -> float:
        """Trials of one epoch a second at the most, as measured."""
        return max((run.window.rate for run in self.runs if not run.plan.sleep), default=0.0)

    @property
    def full(self) -> float:
        """Cores that the driver uses where it can do no more: as in the fastest run that saturated
        it, and one at the most."""
        saturated = [run for run in self.runs if not run.plan.sleep]
        return min(1.0, max(saturated, key=lambda run: run.window.rate).cores) if saturated else 1.0

    def slots(self, seconds: float, epochs: int) -> float:
        """Slots that one driver can feed with trials of this length."""
        return self.cost.slots(seconds, epochs, self.full)

    def groups(self, saturating: bool) -> list[list[Run]]:
        """The runs of each plan."""
        found: dict[Plan, list[Run]] = {}
        for run in self.runs:
            if saturating != bool(run.plan.sleep):
                found.setdefault(run.plan, []).append(run)
        return list(found.values())

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON, with what follows from the measurements."""
        runs = []
        for run in self.runs:
            ideal = run.plan.ideal if run.plan.sleep else None
            efficiency = run.hourly / ideal if ideal else None
            derived = {"hourly": run.hourly, "ideal": ideal, "efficiency": efficiency}
            runs.append({**dataclasses.asdict(run), **derived, "driver_cores": run.cores})
        return {
            "options": dataclasses.asdict(self.options),
            "cores": self.cores,
            "runs": runs,
            "driver_cost": dataclasses.asdict(self.cost),
            "ceiling": self.ceiling,
            "full_cores": self.full,
            "projection": [
                {"seconds": seconds, "epochs": epochs, "slots": self.slots(seconds, epochs)}
                for seconds, epochs in LENGTHS
            ],
        }


def run(options: Options, say: Callable[[str], None]) -> Report:
    """Measure.

    Args:
        options: what is run.
        say: called with a line about each search.

    Raises:
        RunError: a search did not end as it must.
    """
    runs = []
    plans = options.plans()
    with ExitStack() as stack:
        stack.enter_context(Interrupts())
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="topotune-scaling-")))
        try:
            for number, plan in enumerate(plans, start=1):
                kind = f"{plan.epochs} x {plan.sleep:g} s" if plan.sleep else "as fast as it can"
                say(f"{number}/{len(plans)} {plan.slots} slots, {plan.trials} trials, {kind}")
                runs.append(measure(plan, scratch / str(number)))
        except (RunError, ValueError) as error:
            raise RunError(f"bench scaling: {error}") from error
    return Report(options, os.cpu_count() or 1, tuple(runs))


def tables(report: Report) -> Iterator[Table]:
    """The measurements as tables."""
    options, cpu = report.options, _cpu_columns(report)
    study = f"the database of {STUDY_URI}" if STUDY_URI in os.environ else "its own file"
    yield table(
        f"Trials of {options.epochs} epochs that sleep {options.sleep:g} s each; study in {study}; "
        f"{report.cores} cores; medians of {options.rounds} rounds, [least to largest], "
        "(quartiles)",
        {
            "slots": lambda runs: str(runs[0].plan.slots),
            "trials/h": lambda runs: _range([run.hourly for run in runs], 0),
            "ideal": lambda runs: f"{runs[0].plan.ideal:.0f}",
            "of ideal, %": lambda runs: _range([100 * r.hourly / r.plan.ideal for r in runs], 1),
            "between trials, ms": lambda runs: _quartiles([run.between_trials for run in runs]),
            "between epochs, ms": lambda runs: _quartiles(
                [run.between_epochs for run in runs if run.between_epochs]
            ),
            **cpu,
            "trials/h, all told": lambda runs: _range(
                [3600 * run.plan.trials / run.whole for run in runs], 0
            ),
            "start, s": lambda runs: _range([run.start for run in runs], 0),
            "close, s": lambda runs: _range([run.close for run in runs], 0),
            "machine's load": lambda runs: _range([run.load for run in runs], 1),
        },
        report.groups(saturating=False),
        words=0,
    )
    if report.ceiling:
        yield table(
            "Trials of one epoch that does not sleep: all that driver and machine can do",
            {
                "slots": lambda runs: str(runs[0].plan.slots),
                "trials/s": lambda runs: _range([run.window.rate for run in runs], 2),
                "driver's cores": lambda runs: _range([run.cores for run in runs], 2),
                "all cores": lambda runs: _range(
                    [sum(run.cpu.values()) / run.window.seconds for run in runs], 2
                ),
                "between trials, ms": lambda runs: _quartiles([run.between_trials for run in runs]),
                **cpu,
                "machine's load": lambda runs: _range([run.load for run in runs], 1),
            },
            report.groups(saturating=True),
            words=0,
        )
    yield table(
        "Slots that one driver can feed, by what all runs cost it",
        {
            "trial, s": lambda length: f"{length[0]:.0f}",
            "its epochs": lambda length: str(length[1]),
            "slots": lambda length: f"{report.slots(*length):.0f}",
        },
        LENGTHS,
        words=0,
    )


def summary(report: Report) -> str:
    """What the driver's time goes on, in words."""
    cost = report.cost
    measured = f"; measured: {report.ceiling:.1f}" if report.ceiling else ""
    text = (
        f"The driver's CPU time by all runs: {1e3 * cost.second:.0f} ms a second, "
        f"{1e3 * cost.trial:.0f} ms a trial, {1e3 * cost.epoch:.1f} ms an epoch. It can do no more "
        f"at {report.full:.2f} cores: {report.slots(1.0, 1):.1f} trials of one epoch a second"
        f"{measured}."
    )
    if len(report.runs) < _RUNS_TO_TRUST:
        text += (
            f" These are {len(report.runs)} runs, too few to tell the three parts of the cost "
            "apart but roughly: take no figure from them."
        )
    return text


def _cpu_columns(report: Report) -> Columns[list[Run]]:
    def cell(part: str) -> Callable[[list[Run]], str]:
        return lambda runs: _range([1e3 * run.cpu[part] / run.window.trials for run in runs], 0)

    names = ("driver CPU, ms a trial", "Ray", "its helpers", "workers")
    return {name: cell(part) for name, part in zip(names, PARTS, strict=True)}


def _range(values: Sequence[float], digits: int) -> str:
    spread = Spread.range(values)
    text = f"{spread.median:.{digits}f}"
    if len(values) > 1:
        text += f" [{spread.low:.{digits}f}-{spread.high:.{digits}f}]"
    return text


def _quartiles(spreads: Sequence[Spread]) -> str:
    """The median over the rounds of each round's median and quartiles, in milliseconds."""
    if not spreads:
        return ""
    parts = [(spread.median, spread.low, spread.high) for spread in spreads]
    middle, low, high = (1e3 * Spread.range(part).median for part in zip(*parts, strict=True))
    return f"{middle:.0f} ({low:.0f}-{high:.0f})"
