"""A user's task at a known pace, with faults on request: what searches are tested on."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from tests.user_task import Rings


class Paced(Rings):
    """Rings whose every training batch takes ``pause`` seconds.

    Args:
        pause: seconds a batch.
        fault: "raise" raises in the loss, "nan" makes the loss NaN.
    """

    def __init__(self, pause: float = 0.0, fault: str = "") -> None:
        super().__init__()
        self._pause, self._fault = pause, fault

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        time.sleep(self._pause)
        return inputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self._fault == "raise":
            raise RuntimeError("the user's loss is broken")
        loss = super().loss(outputs, targets)
        return loss * float("nan") if self._fault == "nan" else loss
