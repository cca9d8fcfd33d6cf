"""A task that sleeps where others compute, and writes down when."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from topotune.bench.faults.task import PacedRings, in_worker

IMPORT_PATH = "topotune.bench.scaling.task:SleepingRings"
POINTS = 160
"""Training points: a batch of as many makes an epoch one optimizer step."""
SLEPT = "TOPOTUNE_SCALING_SLEPT"
"""Names a file that gets a line a trained epoch: the worker's process id, and the monotonic
seconds at which its sleep began and ended."""


class SleepingRings(PacedRings):
    """Two noisy rings, learnt in one step an epoch, which sleeps first.

    Args:
        sleep: seconds an epoch.
    """

    def __init__(self, sleep: float = 0.0) -> None:
        super().__init__()
        self._sleep = sleep

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """The points as they are, after the sleep."""
        begin = time.monotonic()
        time.sleep(self._sleep)
        if in_worker() and SLEPT in os.environ:
            with Path(os.environ[SLEPT]).open("a", encoding="ascii") as file:
                file.write(f"{os.getpid()} {begin:.4f} {time.monotonic():.4f}\n")
        return inputs
