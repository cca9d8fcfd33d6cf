"""A small task whose data and answers are known, and helpers to compare runs bit for bit."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topotune.data.splits import Splits, TensorPair
from topotune.records import (
    EpochReport,
    OverheadOptions,
    TrainOptions,
    TrialResult,
    TrialSpec,
    Value,
)
from topotune.tasks.base import DataOptions, Task
from topotune.train.checkpoint import CheckpointStore
from topotune.train.trial import TIMING_METRICS, TrialRun

TRAIN_ROWS = 70


class NoisyNet(nn.Module):
    """Dropout, batch statistics, and a training forward that can be told to go bad."""

    def __init__(self, bad_at: int, bad: float) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)
        self.bad_at, self.bad = bad_at, bad
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = nn.functional.dropout(
            torch.relu(self.norm(self.first(inputs))), 0.2, self.training
        )
        outputs: Tensor = self.last(hidden)
        if self.training:
            self.calls.add_(1)
            if int(self.calls) == self.bad_at:
                outputs = outputs * self.bad
        return outputs


class Blobs(Task):
    """Three Gaussian clouds in four dimensions, augmented by noise.

    Args:
        bad_at: the training step whose outputs are multiplied by ``bad``; 0 for none.
        bad: what they are multiplied by.
        scale: factor of the loss, and so of every gradient.
    """

    def __init__(self, bad_at: int = 0, bad: float = math.nan, scale: float = 1.0) -> None:
        self.bad_at, self.bad, self.scale = bad_at, bad, scale
        self.augmented = 0

    def splits(self, options: DataOptions) -> Splits:
        generator = torch.Generator().manual_seed(options.split_seed)
        targets = torch.arange(120) % 3
        centres = torch.randn(3, 4, generator=generator) * 2
        inputs = centres[targets] + torch.randn(120, 4, generator=generator)
        rows = TensorPair(inputs, targets)
        return Splits(rows.rows(0, TRAIN_ROWS), rows.rows(TRAIN_ROWS, 95), rows.rows(95, 120))

    def model(self, name: str | None, options: Mapping[str, Value]) -> nn.Module:
        return NoisyNet(self.bad_at, self.bad)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.scale * nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(1) == targets).float().mean()}

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        self.augmented += 1
        if self.augmented == int(os.environ.get("BLOBS_KILL_AT", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        noise = torch.empty_like(inputs).normal_(generator=generator)
        return inputs + 0.1 * noise


BLOBS = f"{Blobs.__module__}:{Blobs.__qualname__}"

QUIET = OverheadOptions(blocks=0)


def blobs_spec(**changes: Any) -> TrialSpec:
    """A spec of five steps an epoch; overhead off unless asked for."""
    base = TrialSpec(
        task=BLOBS,
        method="adam",
        epochs=3,
        seed=7,
        params={"lr": 0.01},
        train=TrainOptions(batch_size=16, schedule="cosine", grad_clip=1.0),
        overhead=QUIET,
        device="cpu",
        threads=1,
    )
    return dataclasses.replace(base, **changes)


def stable(report: EpochReport) -> dict[str, object]:
    """A report without what depends on the clock; NaN compares equal to itself."""
    metrics = {k: repr(v) for k, v in report.metrics.items() if k not in TIMING_METRICS}
    return {"epoch": report.epoch, "step": report.step, **metrics}


def assert_same(left: object, right: object, place: str = "state") -> None:
    """Equality of nested containers, tensors bit for bit."""
    assert type(left) is type(right), place
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        assert left.dtype == right.dtype, place
        assert torch.equal(left, right), place
    elif isinstance(left, Mapping) and isinstance(right, Mapping):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_same(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        assert len(left) == len(right), place
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{place}[{index}]")
    else:
        assert left == right, place


STEPS = 5  # a Blobs epoch in batches of 16: 70 rows, the last batch of 6

METHODS: dict[str, dict[str, Any]] = {
    "adam": {"params": {"lr": 0.01}},
    "sgd": {
        "params": {"lr": 0.05, "momentum": 0.9},
        "train": TrainOptions(batch_size=16, schedule="linear"),
    },
    "topological_adam-uniform": {"params": {"lr": 0.01, "coupling": "uniform"}},
    "topological_adam-exchange": {"params": {"lr": 0.01, "coupling": "exchange"}},
    "topological_adam-local": {"params": {"lr": 0.01, "coupling": "local"}},
}


def method_spec(name: str, **changes: Any) -> TrialSpec:
    return blobs_spec(method=name.partition("-")[0], **(METHODS[name] | changes))


def state_of(spec: TrialSpec, folder: Path) -> dict[str, Any]:
    """A checkpoint's state with its reports reduced to what does not depend on the clock."""
    state = CheckpointStore(folder, spec).load()
    assert state is not None
    state["history"] = [stable(EpochReport.from_dict(report)) for report in state["history"]]
    del state["overhead"], state["start"]
    for group in state["optimizer"]["param_groups"]:
        group.setdefault("differentiable", False)  # torch adds it to every group that it loads
    return state


def advance(run: TrialRun, epochs: int) -> None:
    """Consume reports up to this epoch and drop the run, as a killed process would."""
    for report in run.reports():
        if report.epoch == epochs:
            break


def reports_of(result: TrialResult) -> list[dict[str, object]]:
    return [stable(report) for report in result.history]


class Line(Task):
    """``y = 2x`` on x = 1, 2, ..., n, learnt by one weight that starts at zero.

    The loss is the mean squared error, so that with weight w a batch's gradient is
    ``2 (w - 2) mean(x^2)``. Keeps the batches that it was asked to augment.
    """

    metric = "error"
    direction = "minimize"

    def __init__(self, rows: int = 5) -> None:
        self.rows = rows
        self.batches: list[list[float]] = []

    def splits(self, options: DataOptions) -> Splits:
        inputs = torch.arange(1.0, self.rows + 1).unsqueeze(1)
        pair = TensorPair(inputs, 2 * inputs)
        return Splits(pair, pair, pair)

    def model(self, name: str | None, options: Mapping[str, Value]) -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"error": (outputs - targets).abs().mean()}

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        self.batches.append(inputs.flatten().tolist())
        return inputs
