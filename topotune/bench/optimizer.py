"""What an optimizer costs: the time of a full training step, against torch's Adam.

``python -m topotune.bench.optimizer [--json]`` prints the table of the README. It needs torch,
typer and rich.

Every contender trains its own copy of the same network on the same batches. They take turns in
blocks of a few steps in one process, in an order that rotates, so that a busy machine slows all of
them alike; a step is forward, backward, update and gradient reset, and each block ends when the
device has finished. A ratio is formed within one round of blocks; the median over the rounds is
reported with its interquartile range.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from topotune.bench.machine import device_name
from topotune.errors import ConfigError, UnknownNameError
from topotune.optim import TopologicalAdam
from topotune.optim.reference import ReferenceTopologicalAdam
from topotune.train.process import synchronise

Builder = Callable[[Iterable[Tensor]], Optimizer]

BASELINE = "Adam (default)"
FUSED = "Adam (fused=True)"

CONTENDERS: dict[str, Builder] = {
    BASELINE: lambda params: torch.optim.Adam(params),
    FUSED: lambda params: torch.optim.Adam(params, fused=True),
    "TopologicalAdam uniform": lambda params: TopologicalAdam(params),
    "TopologicalAdam exchange": lambda params: TopologicalAdam(params, coupling="exchange"),
    "TopologicalAdam local": lambda params: TopologicalAdam(params, coupling="local"),
    "literal recursion": lambda params: ReferenceTopologicalAdam(params),
}
"""What is measured; the last one is the readable twin of ``uniform``, full fields and a
synchronisation on every tensor."""

BATCH = 64
BATCHES = 16
CLASSES = 10


@dataclass(frozen=True)
class StepCost:
    """One contender on one network.

    Attributes:
        model, contender: what was measured.
        parameters: numbers that the network trains.
        step_ms: median time of a full training step, milliseconds.
        vs_adam, vs_adam_spread: median ratio to torch's default Adam and its interquartile range.
        vs_fused, vs_fused_spread: the same against ``fused=True``.
        device, threads: where, and with how many CPU threads.
        rounds, steps: blocks a contender, and steps a block.
    """

    model: str
    contender: str
    parameters: int
    step_ms: float
    vs_adam: float
    vs_adam_spread: float
    vs_fused: float
    vs_fused_spread: float
    device: str
    threads: int
    rounds: int
    steps: int


def _mlp() -> tuple[nn.Module, Tensor]:
    from topotune.models.mlp import MLP

    return MLP(in_features=784, hidden=256, classes=CLASSES), torch.rand(BATCHES, BATCH, 784)


def _cnn() -> tuple[nn.Module, Tensor]:
    from topotune.models.convnet import ConvNet

    return ConvNet(in_channels=3, classes=CLASSES), torch.rand(BATCHES, BATCH, 3, 32, 32)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"mlp": _mlp, "cnn": _cnn}
"""The two-layer network 784-256-10 and the small convolutional network on 32x32x3 images."""


STEPS = {"mlp": 10, "cnn": 1}
"""Steps a block: short blocks, so that the contenders of a round meet the same machine."""


class _Runner:
    """One contender: its own copy of the network, its own optimizer, the shared batches."""

    def __init__(self, model: nn.Module, build: Builder, inputs: Tensor, targets: Tensor) -> None:
        self._model = copy.deepcopy(model)
        self._optimizer = build(self._model.parameters())
        self._inputs, self._targets = inputs, targets
        self._taken = 0

    def block(self, steps: int) -> float:
        """Seconds a step, over a synchronised block."""
        device = self._inputs.device
        synchronise(device)
        begin = time.perf_counter()
        for _ in range(steps):
            batch = self._taken % BATCHES
            outputs = self._model(self._inputs[batch])
            loss = nn.functional.cross_entropy(outputs, self._targets[batch])
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._taken += 1
        synchronise(device)
        return (time.perf_counter() - begin) / steps


def run(
    models: Sequence[str] = ("mlp", "cnn"),
    *,
    rounds: int = 20,
    steps: int | None = None,
    warmup: int | None = None,
    threads: int = 1,
    device: str = "cpu",
) -> list[StepCost]:
    """Measure every contender on every network.

    Args:
        models: names in :data:`MODELS`.
        rounds: blocks a contender.
        steps: training steps a block; None: the network's own of :data:`STEPS`.
        warmup: uncounted steps a contender before the first block; None: as many as a block has.
        threads: CPU threads of torch during the measurement.
        device: a torch device.

    Raises:
        UnknownNameError: a model is not in :data:`MODELS`.
        ConfigError: a count is below 1 (``rounds``: below 2).
    """
    for name in models:
        if name not in MODELS:
            raise UnknownNameError("benchmark model", name, MODELS)
    counts = {"rounds": (rounds, 2), "steps": (steps, 1), "threads": (threads, 1)}
    for option, (value, low) in counts.items():
        if value is not None and value < low:
            raise ConfigError(f"bench optimizer: {option}", f"must be >= {low} (got {value})")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for name in models:
            block = STEPS[name] if steps is None else steps
            uncounted = block if warmup is None else warmup
            found += _measure(name, rounds, block, uncounted, torch.device(device))
        return found
    finally:
        torch.set_num_threads(before)


def _measure(
    name: str, rounds: int, steps: int, warmup: int, device: torch.device
) -> list[StepCost]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    targets = torch.randint(CLASSES, (BATCHES, BATCH))
    model, inputs, targets = model.to(device), inputs.to(device), targets.to(device)
    runners = {
        contender: _Runner(model, build, inputs, targets) for contender, build in CONTENDERS.items()
    }
    for runner in runners.values():
        runner.block(max(1, warmup))
    seconds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    order = list(CONTENDERS)
    for _ in range(rounds):
        for contender in order:
            seconds[contender].append(runners[contender].block(steps))
        order = order[1:] + order[:1]
    records = []
    for contender, times in seconds.items():
        vs_adam, vs_adam_spread = _ratio(times, seconds[BASELINE])
        vs_fused, vs_fused_spread = _ratio(times, seconds[FUSED])
        records.append(
            StepCost(
                model=name,
                contender=contender,
                parameters=sum(p.numel() for p in model.parameters()),
                step_ms=1e3 * statistics.median(times),
                vs_adam=vs_adam,
                vs_adam_spread=vs_adam_spread,
                vs_fused=vs_fused,
                vs_fused_spread=vs_fused_spread,
                device=device_name(device),
                threads=torch.get_num_threads(),
                rounds=rounds,
                steps=steps,
            )
        )
    return records


def _ratio(times: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Median of the ratios within a round, and their interquartile range."""
    ratios = [mine / theirs for mine, theirs in zip(times, baseline, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, high - low


def print_table(records: Sequence[StepCost]) -> None:
    """The records as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    first = records[0]
    table = Table(
        title=f"Full training step, batch {BATCH}, {first.device}, {first.threads} thread(s)"
    )
    for heading in ("network", "optimizer"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "vs Adam", "IQR", "vs fused", "IQR"):
        table.add_column(heading, justify="right")
    for record in records:
        table.add_row(
            record.model,
            record.contender,
            f"{record.step_ms:.2f}",
            f"{record.vs_adam:.2f}",
            f"{record.vs_adam_spread:.2f}",
            f"{record.vs_fused:.2f}",
            f"{record.vs_fused_spread:.2f}",
        )
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m topotune.bench.optimizer``."""
    parser = argparse.ArgumentParser(prog="python -m topotune.bench.optimizer")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    chosen = parser.parse_args(arguments)
    records = run(
        chosen.models,
        rounds=chosen.rounds,
        steps=chosen.steps,
        threads=chosen.threads,
        device=chosen.device,
    )
    if chosen.json:
        print(json.dumps([dataclasses.asdict(record) for record in records], indent=2))
    else:
        print_table(records)


if __name__ == "__main__":
    main()
