"""A training method of its own, small and real: backpropagation with every hook in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from tests.train_cases import blobs_spec
from topotune.data.splits import TensorPair
from topotune.errors import StoppedError, UnstableError
from topotune.records import TrialSpec, Value
from topotune.tasks.base import Task
from topotune.train.learner import BatchResult, Learner
from topotune.train.method import Contender, Method

CAP = 0.5


class WatchedLearner(Learner):
    """Backpropagation that measures, projects, remembers and stops.

    Args:
        task: whose loss.
        probe: rows that the curves are about.
        stop_after: epochs after which no further one starts; 0 for never.
        broken_at: the step that it finds fault with; 0 for none.
        spoil: make the loss of that step NaN as well.
    """

    def __init__(
        self, task: Task, probe: TensorPair, stop_after: int, broken_at: int, spoil: bool
    ) -> None:
        self.task, self.probe = task, probe
        self.stop_after, self.broken_at, self.spoil = stop_after, broken_at, spoil
        self.steps = self.epochs = 0

    def gradients(self, model: nn.Module, batch: TensorPair) -> BatchResult:
        self.steps += 1
        outputs = model(batch.inputs)
        loss = self.task.loss(outputs, batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        broken = self.steps == self.broken_at
        reported = loss.detach() * (torch.nan if broken and self.spoil else 1.0)
        measured = {
            "batch_rows": torch.tensor(float(len(batch))),
            "broken": torch.tensor(float(broken)),
        }
        return BatchResult(reported, outputs.detach(), measured)

    def before_epoch(self) -> None:
        if self.stop_after and self.epochs >= self.stop_after:
            raise StoppedError(f"nothing was learnt in {self.epochs} epochs")

    def after_step(self, model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-CAP, CAP)

    def fault(self, columns: Mapping[str, np.ndarray]) -> tuple[int, str] | None:
        bad = np.flatnonzero(columns["broken"] > 0)
        return (int(bad[0]), "the learner is broken") if bad.size else None

    def metrics(self, model: nn.Module) -> dict[str, float]:
        self.epochs += 1
        largest = max(float(p.detach().abs().max()) for p in model.parameters())
        return {"learner_epochs": float(self.epochs), "largest": largest}

    def curves(self, model: nn.Module) -> dict[str, np.ndarray]:
        steps = 3 + self.epochs
        time = np.arange(steps, dtype=np.float64)
        size = float(self.probe.inputs.double().square().mean())
        return {"time": time, "energy": size * 2.0**-time, "residual": 10.0**-time}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "epochs": self.epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.epochs = state["steps"], state["epochs"]


class Watched(Method):
    """The method of :class:`WatchedLearner`, unstable where ``gamma`` is not below 1."""

    def model(self, task: Task) -> nn.Module:
        gamma = float(self.spec.params.get("gamma", 0.0))  # type: ignore[arg-type]
        if gamma >= 1:
            raise UnstableError("gamma", f"must be below 1 (got {gamma})", "Lower gamma")
        return task.model(self.spec.model, self.spec.model_options)

    def learner(self, task: Task, probe: TensorPair) -> Learner:
        params = self.spec.params
        return WatchedLearner(
            task,
            probe,
            int(params.get("stop_after", 0)),  # type: ignore[arg-type]
            int(params.get("broken_at", 0)),  # type: ignore[arg-type]
            bool(params.get("spoil", False)),
        )

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.SGD(parameters, lr=float(self.spec.params.get("lr", 0.05)))  # type: ignore[arg-type]

    def contenders(
        self, task: Task, probe: TensorPair, device: torch.device
    ) -> Mapping[str, Contender]:
        return {"bptt": Contender(self.optimizer, lambda: self.learner(task, probe))}

    def resolved(self, model: nn.Module) -> dict[str, Value]:
        return {"resolved.tensors": len(list(model.parameters()))}

    def plain(self) -> TrialSpec:
        return dataclasses.replace(self.spec, params={"lr": 0.0})


def watched_spec(**params: Value) -> TrialSpec:
    """Three epochs of five steps of the method ``watched``, which a test registers."""
    return blobs_spec(method="watched", params=params, epochs=3)
