"""What TCEP is worth: exactness of its gradients, memory, solvers, accuracy.

``topotune bench tcep`` prints the tables of ``topotune/tcep/README.md``. All parts but ``accuracy``
need torch, torchdiffeq, numpy, typer and rich only; with ``--data random`` they need no data set
either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from topotune.bench.shared import at_least, device_name, torch_threads
from topotune.bench.tcep import gradients, memory, solvers
from topotune.bench.tcep.setup import BATCH, TRAIN_STEPS, Data, load, training_table
from topotune.errors import UnknownNameError

if TYPE_CHECKING:
    from rich.table import Table

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
        at_least("bench tcep", counts)


Records = dict[str, Sequence[Any]]
"""What was measured, by part; ``trainings`` is how its trained networks were made."""


def conditions(options: Options) -> dict[str, Any]:
    """What everything is measured under."""
    return {
        "device": device_name(torch.device(options.device)),
        "threads": options.threads,
        "torch": str(torch.__version__),
        "data": options.data,
        "batch": BATCH,
        "rounds": options.rounds,
    }


def run(options: Options, progress: Callable[[str], None]) -> Iterator[Records]:
    """Measure the parts that the options ask for.

    Args:
        options: see there.
        progress: gets a line about what is being measured.

    Yields:
        The records of each part when it is done: an interrupted benchmark keeps what it has.

    Raises:
        UnknownNameError: the data, the task or the row is not there.
        DataUnavailableError: the data are not on this machine.
    """
    with torch_threads(options.threads):
        device = torch.device(options.device)
        data = load(options.data, device) if set(options.parts) - {"accuracy"} else None
        for part in (name for name in PARTS if name in options.parts):
            yield _measure(part, options, data, progress)


def _measure(
    part: str, options: Options, data: Data | None, progress: Callable[[str], None]
) -> Records:
    if part == "accuracy":
        from topotune.bench.tcep import accuracy

        return {
            part: accuracy.run(
                options.task,
                seeds=accuracy.SEEDS if options.seeds is None else options.seeds,
                epochs=options.epochs,
                threads=options.threads,
                device=options.device,
                progress=progress,
            )
        }
    assert data is not None
    train_steps, rounds = options.train_steps, options.rounds
    if part == "memory":
        return {part: memory.run(data, steps=options.steps, rounds=rounds, progress=progress)}
    if part == "gradients":
        found, trainings = gradients.run(data, train_steps=train_steps, progress=progress)
        return {"trainings": trainings, part: found}
    taken, trainings = solvers.run(data, rounds=rounds, train_steps=train_steps, progress=progress)
    return {"trainings": trainings, part: taken}


def tables(records: Records) -> Iterator[Table]:
    """What was measured, as tables."""
    for part, rows in records.items():
        if part == "accuracy":
            from topotune.bench.tcep.accuracy import accuracy_table

            yield accuracy_table(rows)
        elif part in _ONE_TABLE:
            yield _ONE_TABLE[part](rows)
        else:
            for net in dict.fromkeys(row.net for row in rows):
                yield _TABLE_A_NET[part](rows, net)


_ONE_TABLE: dict[str, Callable[[Sequence[Any]], Table]] = {
    "trainings": training_table,
    "memory": memory.cost_table,
}
_TABLE_A_NET: dict[str, Callable[[Sequence[Any], str], Table]] = {
    "gradients": gradients.error_table,
    "solvers": solvers.cost_table,
}


def plain(options: Options, parts: Iterable[Records]) -> dict[str, Any]:
    """All parts as data that strict JSON takes; numbers that are not finite become null, and a
    part that was not asked for is empty."""
    found: dict[str, list[Any]] = {part: [] for part in ("trainings", *PARTS)}
    for records in parts:
        for part, rows in records.items():
            found[part] += [_finite(dataclasses.asdict(row)) for row in rows]
    return {**conditions(options), **found}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
