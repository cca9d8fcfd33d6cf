"""What a search file's ``method`` stands for: a network, a learner and an optimizer of a spec."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from topotune.data.splits import TensorPair
from topotune.optim import build_optimizer, fastest_adam
from topotune.records import TrialSpec, Value
from topotune.tasks.base import Task
from topotune.train.learner import Backprop, Learner, check_optimizer

ADAM_RATE = 1e-3
"""Learning rate of the Adam contenders: their cost does not depend on it, and torch's default
keeps them away from overflow where the trial's own rate does not."""

OptimizerBuilder: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Contender:
    """One way to train a copy of a trial's network, timed against others.

    Attributes:
        optimizer: parameters to a fresh optimizer.
        learner: makes a fresh learner.
    """

    optimizer: OptimizerBuilder
    learner: Callable[[], Learner]


class Method(ABC):
    """A way to train, with the parameters of one spec.

    It makes every part of a trial; :data:`topotune.train.methods.METHODS` and the optimizers are
    all there are.

    Attributes:
        spec: what the parts are built from.
    """

    def __init__(self, spec: TrialSpec) -> None:
        self.spec = spec

    @abstractmethod
    def model(self, task: Task) -> nn.Module:
        """The network on the CPU, freshly initialised from torch's global generator.

        Raises:
            UserError: the task has no such model, or the model refuses an option.
        """

    @abstractmethod
    def learner(self, task: Task, probe: TensorPair) -> Learner:
        """A fresh learner.

        Args:
            task: what is learnt.
            probe: prepared rows of the training split, the same for every trial of a task, on
                which a learner may measure once an epoch.

        Raises:
            ConfigError: the method cannot learn from such rows.
        """

    @abstractmethod
    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The optimizer over these parameters.

        Raises:
            UserError: it is unknown, refuses its parameters, or needs a closure.
        """

    @abstractmethod
    def contenders(
        self, task: Task, probe: TensorPair, device: torch.device
    ) -> Mapping[str, Contender]:
        """What the overhead is measured against, by the name in ``overhead_vs_<name>``.

        The step time of the first is reported as ``<name>_step_ms``.
        """

    def resolved(self, model: nn.Module) -> dict[str, Value]:
        """Rows for the table of parameters that only the built network knows."""
        return {}

    def remarks(self, specs: Sequence[TrialSpec]) -> list[str]:
        """What a search should hear before it starts, a line each.

        Args:
            specs: the extremes of its space.
        """
        return []

    @abstractmethod
    def plain(self) -> TrialSpec:
        """A spec that reports the same metrics, the optimizer's own apart, and moves nothing."""


class OptimizerMethod(Method):
    """Backpropagation with an optimizer: what ``method`` means where it names one."""

    def model(self, task: Task) -> nn.Module:
        """The spec's model, or the task's default."""
        return task.model(self.spec.model, self.spec.model_options)

    def learner(self, task: Task, probe: TensorPair) -> Learner:
        """Backpropagation of the task's loss; it measures nothing on the probe."""
        return Backprop(task)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The optimizer that the spec names, with the spec's parameters."""
        optimizer = build_optimizer(self.spec.method, parameters, self.spec.params)
        check_optimizer(optimizer, self.spec.method)
        return optimizer

    def contenders(
        self, task: Task, probe: TensorPair, device: torch.device
    ) -> Mapping[str, Contender]:
        """``adam``: the fastest that torch has on the device; ``adam_default``: torch's default."""

        def learner() -> Learner:
            return self.learner(task, probe)

        return {
            "adam": Contender(
                lambda parameters: fastest_adam(parameters, device, ADAM_RATE), learner
            ),
            "adam_default": Contender(
                lambda parameters: torch.optim.Adam(parameters, lr=ADAM_RATE), learner
            ),
        }

    def plain(self) -> TrialSpec:
        """Gradient descent with a rate of zero."""
        return dataclasses.replace(self.spec, method="sgd", params={"lr": 0.0})
