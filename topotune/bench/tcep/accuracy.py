"""What TCEP learns: the same network by every gradient, its controls, and an MLP by Adam.

Every row is a trial as a search would run it, on the same splits, with the same seeds, for the
same epochs. Figures are those of the last epoch, not of the best one: nothing is chosen by them.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING

from topotune.bench.shared import at_least, number, table
from topotune.errors import UnknownNameError
from topotune.records import Outcome, OverheadOptions, TrainOptions, TrialSpec, Value
from topotune.train.trial import run_trial
from topotune.train.weights import evaluate_test, load_weights

if TYPE_CHECKING:
    from rich.table import Table

EPOCHS: Mapping[str, int] = {"digits_rolled": 20, "mnist5k": 8}
"""The tasks, and how long each trains."""

RATE: Mapping[str, float] = {"digits_rolled": 1e-2, "mnist5k": 3e-3}
BATCH = 64
SCHEDULE = "cosine"
"""Of every row; the optimizer is Adam. The rates were chosen on the validation split of seed 0, for
the TCEP network and for the MLP alike: the best of 1e-3, 3e-3, 1e-2 and 3e-2 for the MLP too."""

NETWORK: Mapping[str, Mapping[str, Value]] = {
    "digits_rolled": {"width": 64, "heads": 8, "hidden": 256, "memory": 64},
    "mnist5k": {"width": 32, "heads": 2, "hidden": 256, "memory": 64},
}

MLP: Mapping[str, Value] = {"hidden": 256}

SEEDS = 3
SHARE = "unconverged_share"

ROWS: Mapping[str, Mapping[str, Value] | None] = {
    "eqprop": {"gradient": "eqprop"},
    "eqprop, gamma 0": {"gradient": "eqprop", "recirculation": "none"},
    "implicit": {"gradient": "implicit"},
    "bptt": {"gradient": "bptt"},
    "head only": {"gradient": "head"},
    "MLP 256, Adam": None,
}
"""TCEP's parameters; None for the MLP."""


@dataclass(frozen=True)
class Accuracy:
    """One row over its seeds.

    Attributes:
        task, row, epochs: what was trained.
        seeds: of the trials.
        outcomes: how each ended; the figures are of those that completed.
        val, test: accuracy of each completed seed after the last epoch.
        val_mean, test_mean: their means; None where no seed completed.
        seconds_per_epoch: mean wall time of all epochs, training and validation.
        unconverged_share: mean over the last epochs of the seeds; None for the MLP.
        parameters: the method's own, as the trials got them.
    """

    task: str
    row: str
    epochs: int
    seeds: tuple[int, ...]
    outcomes: tuple[str, ...]
    val: tuple[float, ...]
    test: tuple[float, ...]
    val_mean: float | None
    test_mean: float | None
    seconds_per_epoch: float
    unconverged_share: float | None
    parameters: Mapping[str, Value]


def run(
    task: str = "digits_rolled",
    *,
    rows: Sequence[str] = tuple(ROWS),
    seeds: int = SEEDS,
    epochs: int | None = None,
    network: Mapping[str, Value] | None = None,
    threads: int = 1,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
) -> list[Accuracy]:
    """Train every row with every seed.

    Args:
        task: a key of :data:`EPOCHS`.
        rows: keys of :data:`ROWS`.
        seeds: how many; they are 0, 1, ...
        epochs: None: the task's own of :data:`EPOCHS`.
        network: options of the TCEP model; None: the task's own of :data:`NETWORK`.
        threads, device: as in :class:`TrialSpec`.
        progress: called with what is being trained.

    Raises:
        UnknownNameError: the task or a row is not there.
        ConfigError: a count is below 1.
    """
    if task not in EPOCHS:
        raise UnknownNameError("benchmark task", task, EPOCHS)
    for row in rows:
        if row not in ROWS:
            raise UnknownNameError("benchmark row", row, ROWS)
    count = EPOCHS[task] if epochs is None else epochs
    at_least("bench tcep", [("seeds", seeds, 1), ("epochs", count, 1)])
    options = NETWORK[task] if network is None else network
    found = []
    for row in rows:
        own = ROWS[row]
        specs = [
            TrialSpec(
                task=task,
                method="adam" if own is None else "tcep",
                epochs=count,
                seed=seed,
                params={"lr": RATE[task], **(own or {})},
                model="mlp" if own is None else "tcep",
                model_options=MLP if own is None else options,
                train=TrainOptions(batch_size=BATCH, schedule=SCHEDULE),
                overhead=OverheadOptions(blocks=0),
                device=device,
                threads=threads,
            )
            for seed in range(seeds)
        ]
        found.append(_train(row, specs, progress))
    return found


def _train(row: str, specs: Sequence[TrialSpec], tell: Callable[[str], None]) -> Accuracy:
    outcomes, seconds = [], []
    val, test, shares = [], [], []
    for spec in specs:
        tell(f"accuracy: {row}, seed {spec.seed}")
        with tempfile.TemporaryDirectory() as name:
            result = run_trial(spec, folder=Path(name))
            outcomes.append(result.outcome.value)
            seconds += [report.seconds for report in result.history]
            if result.outcome is Outcome.COMPLETE:
                last = result.history[-1].metrics
                val.append(last.get("val_accuracy", nan))
                shares += [last[SHARE]] if SHARE in last else []
                weights = load_weights(spec, Path(name))
                test.append(evaluate_test(spec, weights)["test_accuracy"])
    return Accuracy(
        task=specs[0].task,
        row=row,
        epochs=specs[0].epochs,
        seeds=tuple(spec.seed for spec in specs),
        outcomes=tuple(outcomes),
        val=tuple(val),
        test=tuple(test),
        val_mean=statistics.fmean(val) if val else None,
        test_mean=statistics.fmean(test) if test else None,
        seconds_per_epoch=statistics.fmean(seconds) if seconds else 0.0,
        unconverged_share=statistics.fmean(shares) if shares else None,
        parameters=dict(specs[0].params),
    )


def accuracy_table(records: Sequence[Accuracy]) -> Table:
    """Accuracy after the last epoch: mean, and from the lowest to the highest seed."""
    first = records[0]
    return table(
        f"Accuracy on {first.task} after {first.epochs} epochs, {len(first.seeds)} seed(s): "
        "mean (lowest to highest)",
        {
            "trained by": lambda one: one.row,
            "validation": lambda one: _range(one.val_mean, one.val),
            "test": lambda one: _range(one.test_mean, one.test),
            "s an epoch": lambda one: f"{one.seconds_per_epoch:.2f}",
            "unconverged": lambda one: number(one.unconverged_share, "{:.2%}"),
            "completed": lambda one: f"{one.outcomes.count('COMPLETE')}/{len(one.outcomes)}",
        },
        records,
    )


def _range(mean: float | None, values: Sequence[float]) -> str:
    if mean is None:
        return "-"
    return f"{mean:.2%} ({min(values):.2%} to {max(values):.2%})"
