"""How a batch becomes gradients: the seam at which training methods plug in."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from topotune.data.splits import TensorPair
from topotune.errors import ConfigError
from topotune.tasks.base import Task


class BatchResult(NamedTuple):
    """What one batch gave besides its gradients.

    Attributes:
        loss: the batch's mean loss, 0-d, detached, on the device. A fresh tensor each time: the
            loop keeps many of them before it looks at one.
        outputs: the model's outputs that the loss was taken of, detached, (batch, ...).
        measured: further values of the batch, by name: 0-d, detached, on the device, fresh each
            time, and of the same names at every batch. Each is a column of the step trace, and
            its example-weighted mean over an epoch is a metric of that name.
    """

    loss: Tensor
    outputs: Tensor
    measured: Mapping[str, Tensor] = MappingProxyType({})


class Learner(ABC):
    """Turns a batch into gradients in ``.grad``; the loop and the optimizer do the rest.

    Backpropagation is one way. A learner may keep state of its own (adapted coefficients,
    estimates of curvature): whatever must survive a restart goes through :meth:`state_dict`. It
    draws randomness from torch's global generators only, which checkpoints save.
    """

    @abstractmethod
    def gradients(self, model: nn.Module, batch: TensorPair) -> BatchResult:
        """Write the gradient of the batch's loss into the ``.grad`` of the model's parameters.

        Args:
            model: in training mode, its gradients cleared.
            batch: prepared and augmented inputs with their targets, on the device.

        Where nothing can be learnt from a batch, every ``.grad`` stays None: the loop then takes
        no optimizer step. What is returned is recorded all the same.

        Must not synchronise with the host: no ``.item()``, no ``print`` of a tensor.
        """

    def before_epoch(self) -> None:
        """Called before each epoch; a look back at what the epochs so far led to.

        Raises:
            StoppedError: another epoch would be wasted.
        """
        return

    def after_step(self, model: nn.Module) -> None:
        """Called after each optimizer step, such as to bring the parameters back to a set."""
        return

    def fault(self, columns: Mapping[str, np.ndarray]) -> tuple[int, str] | None:
        """The first step that cannot be trained on, if there is one among the last few.

        Args:
            columns: ``loss``, ``grad_norm`` and what :meth:`gradients` measured, one value a
                step, on the host.

        Returns:
            The step's index in the columns and the cause, which ends the trial as diverged.
        """
        return None

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Values of the epoch that just ended, asked for once an epoch; starts the next one.

        Args:
            model: after the epoch's last step, in training mode.
        """
        return {}

    def curves(self, model: nn.Module) -> dict[str, np.ndarray]:
        """What the model does with one batch of probe rows, step by step, after an epoch.

        Called once an epoch where a trial keeps files; must change neither model nor learner.

        Returns:
            ``time`` and whatever else is known at each time, 1-d; empty for a learner whose model
            has no course of its own.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State to save: tensors, numbers, text and plain containers of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: the state has entries that this learner does not keep.
        """
        if state:
            raise ValueError(
                f"{type(self).__name__} keeps no state, got {', '.join(sorted(state))}"
            )


class Backprop(Learner):
    """Reverse-mode differentiation of the task's loss: the default."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def gradients(self, model: nn.Module, batch: TensorPair) -> BatchResult:
        """One forward and one backward pass."""
        outputs = model(batch.inputs)
        loss = self._task.loss(outputs, batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return BatchResult(loss.detach(), outputs.detach())


def check_optimizer(optimizer: Optimizer, name: str, kind: str = "method") -> None:
    """Check that the loop can drive this optimizer.

    The loop computes each batch's gradients once; an optimizer that must evaluate the loss again
    within a step (L-BFGS) would not know how. Schedules need a rate to scale.

    Args:
        optimizer: to check.
        name: what it was asked for by.
        kind: the parameter that holds this name.

    Raises:
        ConfigError: ``step`` has a closure without a default, or a parameter group has no ``lr``.
    """
    place, found = f"{kind} {name!r}", type(optimizer).__name__
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            place,
            f"{found}.step needs a closure that evaluates the loss again, and the training loop "
            "computes the gradients of a batch once",
            "Choose an optimizer whose step can be called without arguments, such as 'adam'",
        )
    if any("lr" not in group for group in optimizer.param_groups):
        raise ConfigError(
            place,
            f"{found} has a parameter group without 'lr', which learning-rate schedules scale",
            "Give each of its param_groups an 'lr'",
        )
