"""What an optimizer costs: the time of a full training step, against torch's Adam.

``topotune bench optimizer`` prints the table of ``docs/optimizer.md``.

Every contender trains its own copy of the same network on the same batches. They take turns in
blocks of a few steps in one process, in an order that rotates, so that a busy machine slows all of
them alike; a step is forward, backward, update and gradient reset, and each block ends when the
device has finished. A ratio is formed within one round of blocks; the median over the rounds is
reported with its interquartile range.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from topotune.bench.shared import alternate, at_least, device_name, ratio, table, torch_threads
from topotune.errors import UnknownNameError
from topotune.models.convnet import ConvNet
from topotune.models.mlp import MLP
from topotune.optim import TopologicalAdam
from topotune.optim.reference import ReferenceTopologicalAdam

if TYPE_CHECKING:
    from rich.table import Table

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
    return MLP(in_features=784, hidden=256, classes=CLASSES), torch.rand(BATCHES, BATCH, 784)


def _cnn() -> tuple[nn.Module, Tensor]:
    return ConvNet(in_channels=3, classes=CLASSES), torch.rand(BATCHES, BATCH, 3, 32, 32)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"mlp": _mlp, "cnn": _cnn}
"""The two-layer network 784-256-10 and the small convolutional network on 32x32x3 images."""


STEPS = {"mlp": 10, "cnn": 1}
"""Steps a block: short blocks, so that the contenders of a round meet the same machine."""


class _Runner:
    """One contender: its own copy of the network, its own optimizer, the shared batches."""

    def __init__(
        self, model: nn.Module, build: Builder, inputs: Tensor, targets: Tensor, steps: int
    ) -> None:
        self._model = copy.deepcopy(model)
        self._optimizer = build(self._model.parameters())
        self._inputs, self._targets, self._steps = inputs, targets, steps
        self._taken = 0

    def __call__(self) -> None:
        """A block of steps."""
        for _ in range(self._steps):
            batch = self._taken % BATCHES
            outputs = self._model(self._inputs[batch])
            loss = nn.functional.cross_entropy(outputs, self._targets[batch])
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._taken += 1


def run(
    models: Sequence[str] = ("mlp", "cnn"),
    *,
    rounds: int = 20,
    steps: int | None = None,
    threads: int = 1,
    device: str = "cpu",
) -> list[StepCost]:
    """Measure every contender on every network, after a block of each that does not count.

    Args:
        models: names in :data:`MODELS`.
        rounds: blocks a contender.
        steps: training steps a block; None: the network's own of :data:`STEPS`.
        threads: CPU threads of torch during the measurement.
        device: a torch device.

    Raises:
        UnknownNameError: a model is not in :data:`MODELS`.
        ConfigError: a count is below 1 (``rounds``: below 2).
    """
    for name in models:
        if name not in MODELS:
            raise UnknownNameError("benchmark model", name, MODELS)
    counts = [("rounds", rounds, 2), ("steps", steps, 1), ("threads", threads, 1)]
    at_least("bench optimizer", counts)
    with torch_threads(threads):
        return [
            cost
            for name in models
            for cost in _measure(name, rounds, steps or STEPS[name], torch.device(device))
        ]


def _measure(name: str, rounds: int, steps: int, device: torch.device) -> list[StepCost]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    targets = torch.randint(CLASSES, (BATCHES, BATCH))
    model, inputs, targets = model.to(device), inputs.to(device), targets.to(device)
    runners = {
        contender: _Runner(model, build, inputs, targets, steps)
        for contender, build in CONTENDERS.items()
    }
    seconds = alternate(runners, rounds, device)
    costs = []
    for contender, times in seconds.items():
        vs_adam, vs_adam_spread = ratio(times, seconds[BASELINE])
        vs_fused, vs_fused_spread = ratio(times, seconds[FUSED])
        costs.append(
            StepCost(
                model=name,
                contender=contender,
                parameters=sum(p.numel() for p in model.parameters()),
                step_ms=1e3 * statistics.median(times) / steps,
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
    return costs


def step_table(costs: Sequence[StepCost]) -> Table:
    """The costs as ``docs/optimizer.md`` has them."""
    first = costs[0]
    return table(
        f"Full training step, batch {BATCH}, {first.device}, {first.threads} thread(s)",
        {
            "network": lambda cost: cost.model,
            "optimizer": lambda cost: cost.contender,
            "ms": lambda cost: f"{cost.step_ms:.2f}",
            "vs Adam": lambda cost: f"{cost.vs_adam:.2f}",
            "vs Adam, IQR": lambda cost: f"{cost.vs_adam_spread:.2f}",
            "vs fused": lambda cost: f"{cost.vs_fused:.2f}",
            "vs fused, IQR": lambda cost: f"{cost.vs_fused_spread:.2f}",
        },
        costs,
        words=2,
    )
