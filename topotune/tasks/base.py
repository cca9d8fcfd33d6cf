"""A task: what is learnt, from which data, by which model, and how success is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from topotune.data.splits import Splits
from topotune.records import Value


@dataclass(frozen=True)
class DataOptions:
    """What every task needs to find and split its data.

    Attributes:
        data_dir: folder of downloaded data sets; None means the loader's default.
        download: whether a missing data set may be downloaded.
        split_seed: seed of the train / validation / test split.
    """

    data_dir: str | None = None
    download: bool = True
    split_seed: int = 0


class Task(ABC):
    """Model, data, loss and metrics behind one interface.

    Subclass it in a module of your own and name it in a search file as
    ``task: {name: "my_module:MyTask"}``. The constructor takes the task's options as keyword
    arguments, whatever stands under ``task.options``. ``topotune.testing.TaskContract`` is a test
    class to inherit that checks a task against this page.

    Attributes:
        metric: the headline metric's name in :meth:`metrics`; the search file's ``val_<metric>``.
        direction: "maximize" or "minimize" for that metric.
    """

    metric: ClassVar[str] = "accuracy"
    direction: ClassVar[str] = "maximize"

    @abstractmethod
    def splits(self, options: DataOptions) -> Splits:
        """The three disjoint splits on the CPU; the caller moves them to the device once.

        Raises:
            DataUnavailableError: the data is not on disk and cannot be downloaded.
        """

    @abstractmethod
    def model(self, name: str | None, options: Mapping[str, Value]) -> nn.Module:
        """A freshly initialised model, from torch's global generator.

        Args:
            name: a model that this task knows; None for its default.
            options: keyword arguments of the model.

        Raises:
            UnknownNameError: the task knows no such model.
            ConfigError: the model does not take these options.
        """

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar that ``backward`` is called on."""

    @abstractmethod
    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Name to the mean over the batch, 0-d tensors on the batch's device (no ``.item()``)."""

    def prepare(self, inputs: Tensor) -> Tensor:
        """Raw rows to model inputs, on the device (normalisation). Identity unless overridden."""
        return inputs

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Random training-time changes of prepared inputs, on the device. Identity by default.

        All randomness comes from ``generator`` (on the inputs' device), which checkpoints save.
        """
        return inputs
