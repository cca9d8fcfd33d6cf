"""A user's task whose pace a test sets while it runs; a client ships it with ``plain_rings``."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from tests.user_task import Rings


class Paced(Rings):
    """Rings whose every training batch takes ``pause`` seconds, until a file appears.

    Args:
        pause: seconds a batch.
        hurry: the file, where all nodes see it.
    """

    def __init__(self, pause: float = 0.0, hurry: str = "") -> None:
        super().__init__()
        self._pause, self._hurry = pause, hurry

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        if not (self._hurry and Path(self._hurry).exists()):
            time.sleep(self._pause)
        return inputs
