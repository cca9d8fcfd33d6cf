"""A task that sleeps where others compute, and writes down when."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from topotune.data import SplitPlan, Splits, TensorPair, stratified_splits
from topotune.models import build_model
from topotune.tasks import ClassificationTask, DataOptions

IMPORT_PATH = "topotune.bench.scaling.task:SleepingRings"
POINTS = 160
"""Training points: a batch of as many makes an epoch one optimizer step."""
SLEPT = "TOPOTUNE_SCALING_SLEPT"
"""Names a file that gets a line a trained epoch: the worker's process id, and the monotonic
seconds at which its sleep began and ended."""


def in_worker() -> bool:
    """Whether this process is Ray's worker, and not the driver, which tries a search out first."""
    return sys.argv[0].endswith("default_worker.py")


class SleepingRings(ClassificationTask):
    """Two noisy rings, learnt in one step an epoch, which sleeps first.

    Args:
        sleep: seconds an epoch.
    """

    def __init__(self, sleep: float = 0.0) -> None:
        self._sleep = sleep

    def splits(self, options: DataOptions) -> Splits:
        """200 points (200, 2) and the number of their ring, of which ``POINTS`` train."""
        generator = torch.Generator().manual_seed(0)
        ring = torch.arange(POINTS * 5 // 4) % 2
        angle = 2 * torch.pi * torch.rand(len(ring), generator=generator)
        radius = 1 + ring + 0.3 * torch.randn(len(ring), generator=generator)
        points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        return stratified_splits(
            TensorPair(points, ring), SplitPlan(0.1, 0.1, seed=options.split_seed)
        )

    def model(self, name: str | None, options: Mapping[str, object]) -> nn.Module:
        """An MLP with 16 hidden units, where nothing else is asked for."""
        return build_model(name or "mlp", {"hidden": 16, **options}, in_features=2, classes=2)

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """The points as they are, after the sleep."""
        begin = time.monotonic()
        time.sleep(self._sleep)
        if in_worker() and SLEPT in os.environ:
            with Path(os.environ[SLEPT]).open("a", encoding="ascii") as file:
                file.write(f"{os.getpid()} {begin:.4f} {time.monotonic():.4f}\n")
        return inputs
