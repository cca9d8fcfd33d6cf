"""What TCEP is worth: exactness of its gradients, memory, solvers, accuracy.

``python -m topotune.bench.tcep [--part ...] [--json]`` prints the tables of the README. All parts
but ``accuracy`` need torch, torchdiffeq, numpy, typer and rich only; with ``--data random`` they
need no data set either.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from topotune.bench.machine import device_name
from topotune.bench.tcep import gradients, memory, solvers
from topotune.bench.tcep.gradients import GradientError
from topotune.bench.tcep.memory import GradientCost
from topotune.bench.tcep.setup import TRAIN_STEPS, Data, Training, load
from topotune.bench.tcep.solvers import SolverCost
from topotune.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from rich.console import Console

    from topotune.bench.tcep.accuracy import Accuracy

PARTS = ("gradients", "memory", "solvers", "accuracy")
DEFAULT_PARTS = PARTS[:3]
ALL = "all"

DATA = "digits_rolled"


@dataclass(frozen=True)
class Options:
    """What to measure, and on what.

    Attributes:
        parts: of :data:`PARTS`, or "all".
        data: an image task, or "random", for all parts but accuracy.
        task: for accuracy.
        seeds, epochs: of accuracy; None: its own.
        steps: of memory.
        rounds: alternating rounds of what is timed.
        train_steps: steps that the trained networks of gradients and solvers get.
        threads: CPU threads of torch.
        device: a torch device.
    """

    parts: tuple[str, ...] = DEFAULT_PARTS
    data: str = DATA
    task: str = DATA
    seeds: int | None = None
    epochs: int | None = None
    steps: tuple[int, ...] = memory.STEPS
    rounds: int = memory.ROUNDS
    train_steps: int = TRAIN_STEPS
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        known = (*PARTS, ALL)
        for part in self.parts:
            if part not in known:
                raise UnknownNameError("benchmark part", part, known)
        if ALL in self.parts:
            object.__setattr__(self, "parts", PARTS)
        counts = [("rounds", self.rounds, 2), ("train_steps", self.train_steps, 1)]
        counts += [("threads", self.threads, 1), *(("steps", steps, 1) for steps in self.steps)]
        for name, value, low in counts:
            if value < low:
                raise ConfigError(f"bench tcep: {name}", f"must be >= {low} (got {value})")


@dataclass(frozen=True)
class Report:
    """What was measured; a part that was not asked for is empty.

    Attributes:
        device, threads, torch: under which conditions.
        data: what all parts but accuracy were measured on.
        trainings: how the trained networks were made.
        gradients, memory, solvers, accuracy: the records of the parts.
    """

    device: str
    threads: int
    torch: str
    data: str
    trainings: tuple[Training, ...] = ()
    gradients: tuple[GradientError, ...] = ()
    memory: tuple[GradientCost, ...] = ()
    solvers: tuple[SolverCost, ...] = ()
    accuracy: tuple[Accuracy, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data that strict JSON takes; numbers that are not finite become null."""
        plain = _plain(dataclasses.asdict(self))
        assert isinstance(plain, dict)
        return plain


def run(
    options: Options,
    progress: Callable[[str], None] = lambda text: None,
    finished: Callable[[Report], None] = lambda part: None,
) -> Report:
    """Measure the parts that the options ask for.

    Args:
        options: see there.
        progress: gets a line about what is being measured.
        finished: gets each part when it is done, as a report of that part alone; before all, the
            conditions, as a report of none.

    Raises:
        UnknownNameError: the data, the task or the row is not there.
        DataUnavailableError: the data are not on this machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return _run(options, progress, finished)
    finally:
        torch.set_num_threads(before)


def _run(
    options: Options, progress: Callable[[str], None], finished: Callable[[Report], None]
) -> Report:
    device = torch.device(options.device)
    conditions = Report(
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        data=options.data,
    )
    data = load(options.data, device) if set(options.parts) - {"accuracy"} else None
    finished(conditions)
    found: dict[str, Any] = {}
    for part in (name for name in PARTS if name in options.parts):
        records = _measure(part, options, data, progress)
        finished(dataclasses.replace(conditions, **records))
        found |= {name: (*found.get(name, ()), *rows) for name, rows in records.items()}
    return dataclasses.replace(conditions, **found)


def _measure(
    part: str, options: Options, data: Data | None, progress: Callable[[str], None]
) -> dict[str, Any]:
    """The records of one part, by the fields of :class:`Report`."""
    if part == "accuracy":
        from topotune.bench.tcep import accuracy

        rows = accuracy.run(
            options.task,
            seeds=accuracy.SEEDS if options.seeds is None else options.seeds,
            epochs=options.epochs,
            threads=options.threads,
            device=options.device,
            progress=progress,
        )
        return {part: tuple(rows)}
    assert data is not None
    train_steps, rounds = options.train_steps, options.rounds
    if part == "memory":
        costs = memory.run(data, steps=options.steps, rounds=rounds, progress=progress)
        return {part: tuple(costs)}
    if part == "gradients":
        errors, trainings = gradients.run(data, train_steps=train_steps, progress=progress)
        return {part: tuple(errors), "trainings": tuple(trainings)}
    taken, trainings = solvers.run(data, rounds=rounds, train_steps=train_steps, progress=progress)
    return {part: tuple(taken), "trainings": tuple(trainings)}


def print_report(report: Report) -> None:
    """The parts of a report as tables on standard output."""
    from topotune.bench.tcep import tables

    out = _console()
    if report.trainings:
        out.print(tables.trainings(report.trainings))
    for net in dict.fromkeys(record.net for record in report.gradients):
        out.print(tables.gradients(report.gradients, net))
    if report.memory:
        out.print(tables.memory(report.memory))
    for net in dict.fromkeys(record.net for record in report.solvers):
        out.print(tables.solvers(report.solvers, net))
    if report.accuracy:
        out.print(tables.accuracy(report.accuracy))


def print_part(report: Report) -> None:
    """What :func:`run` says is finished, at once: an interrupted benchmark keeps what it has."""
    if not (report.gradients or report.memory or report.solvers or report.accuracy):
        conditions = f"{report.device}, {report.threads} thread(s), torch {report.torch}"
        _console().print(conditions)
    print_report(report)
    sys.stdout.flush()


def _console() -> Console:
    from rich.console import Console

    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=200)


def tell(text: str) -> None:
    """Progress on standard error, so that standard output holds the result only."""
    sys.stderr.write(text + "\n")


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m topotune.bench.tcep``."""
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m topotune.bench.tcep")
    parser.add_argument("--part", nargs="+", default=list(default.parts), choices=[*PARTS, ALL])
    parser.add_argument("--data", default=default.data, help="an image task, or random")
    parser.add_argument("--task", default=default.task, help="the task of part accuracy")
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--steps", type=int, nargs="+", default=list(default.steps))
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--train-steps", type=int, default=default.train_steps)
    parser.add_argument("--threads", type=int, default=default.threads)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    chosen = vars(parser.parse_args(arguments))
    as_json, parts, steps = chosen.pop("json"), chosen.pop("part"), chosen.pop("steps")
    options = Options(parts=tuple(parts), steps=tuple(steps), **chosen)
    if as_json:
        print(json.dumps(run(options, tell).to_dict(), indent=2, allow_nan=False))
    else:
        run(options, tell, print_part)
