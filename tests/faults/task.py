"""A small task at a known pace: what the searches of the fault tests train."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from topotune.bench.scaling.task import POINTS, SleepingRings, in_worker

IMPORT_PATH = "tests.faults.task:PacedRings"
BATCHES = POINTS // 32
"""Training batches of an epoch, of 32 points each."""
TRAINED = "TOPOTUNE_FAULT_TRAINED"
"""Names a file that gets a line whenever a worker begins to train an epoch, finished or not."""
PAUSE = "TOPOTUNE_FAULT_PAUSE"
"""Seconds a batch in place of the task's own, for the processes of one command."""


class PacedRings(SleepingRings):
    """Two noisy rings; every training batch takes ``pause`` seconds.

    Args:
        pause: seconds a batch; there are ``BATCHES`` in an epoch.
    """

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self._pause = float(os.environ.get(PAUSE, pause))
        self._seen = 0

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """The points as they are, after the pause."""
        if in_worker() and self._seen % BATCHES == 0 and TRAINED in os.environ:
            with Path(os.environ[TRAINED]).open("a", encoding="ascii") as file:
                file.write(f"{os.getpid()} {time.monotonic():.3f}\n")
        self._seen += 1
        time.sleep(self._pause)
        return inputs
