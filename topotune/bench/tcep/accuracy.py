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

from topotune.errors import ConfigError, UnknownNameError
from topotune.records import Outcome, OverheadOptions, TrainOptions, TrialSpec, Value
from topotune.train.trial import run_trial
from topotune.train.weights import evaluate_test, load_weights

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
        progress: told what is being trained.

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
    for option, value in (("seeds", seeds), ("epochs", count)):
        if value < 1:
            raise ConfigError(f"bench tcep: {option}", f"must be >= 1 (got {value})")
    options = NETWORK[task] if network is None else network
    found = []
    for row in rows:
        trials = []
        for seed in range(seeds):
            progress(f"accuracy: {row}, seed {seed}")
            trials.append(_train(_spec(task, row, seed, count, options, threads, device)))
        found.append(_gather(task, row, count, trials))
    return found


@dataclass(frozen=True)
class _Trial:
    """What one trial came to."""

    spec: TrialSpec
    outcome: Outcome
    val: float
    test: float
    seconds: tuple[float, ...]
    unconverged: float | None


def _spec(
    task: str,
    row: str,
    seed: int,
    epochs: int,
    network: Mapping[str, Value],
    threads: int,
    device: str,
) -> TrialSpec:
    own = ROWS[row]
    method: str = "adam" if own is None else "tcep"
    params: dict[str, Value] = {"lr": RATE[task], **(own or {})}
    return TrialSpec(
        task=task,
        method=method,
        epochs=epochs,
        seed=seed,
        params=params,
        model="mlp" if own is None else "tcep",
        model_options=MLP if own is None else network,
        train=TrainOptions(batch_size=BATCH, schedule=SCHEDULE),
        overhead=OverheadOptions(blocks=0),
        device=device,
        threads=threads,
    )


def _train(spec: TrialSpec) -> _Trial:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = run_trial(spec, folder=folder)
        complete = result.outcome is Outcome.COMPLETE
        test = evaluate_test(spec, load_weights(spec, folder))["test_accuracy"] if complete else nan
    last = result.history[-1].metrics if result.history else {}
    return _Trial(
        spec=spec,
        outcome=result.outcome,
        val=last.get("val_accuracy", nan),
        test=test,
        seconds=tuple(report.seconds for report in result.history),
        unconverged=last.get("unconverged_share"),
    )


def _gather(task: str, row: str, epochs: int, trials: Sequence[_Trial]) -> Accuracy:
    done = [trial for trial in trials if trial.outcome is Outcome.COMPLETE]
    val = tuple(trial.val for trial in done)
    test = tuple(trial.test for trial in done)
    seconds = [value for trial in trials for value in trial.seconds]
    shares = [trial.unconverged for trial in done if trial.unconverged is not None]
    return Accuracy(
        task=task,
        row=row,
        epochs=epochs,
        seeds=tuple(trial.spec.seed for trial in trials),
        outcomes=tuple(trial.outcome.value for trial in trials),
        val=val,
        test=test,
        val_mean=statistics.fmean(val) if val else None,
        test_mean=statistics.fmean(test) if test else None,
        seconds_per_epoch=statistics.fmean(seconds) if seconds else 0.0,
        unconverged_share=statistics.fmean(shares) if shares else None,
        parameters=dict(trials[0].spec.params),
    )
