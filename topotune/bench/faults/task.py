"""A small task at a known pace, with faults on request: what the faulted searches train."""

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

IMPORT_PATH = "topotune.bench.faults.task:PacedRings"
BATCHES = 5
"""Training batches of an epoch, of 32 points each."""
TRAINED = "TOPOTUNE_FAULT_TRAINED"
"""Names a file that gets a line whenever a worker begins to train an epoch, finished or not."""
PAUSE = "TOPOTUNE_FAULT_PAUSE"
"""Seconds a batch in place of the task's own, for the processes of one command."""


def in_worker() -> bool:
    """Whether this process is Ray's worker, and not the driver, which tries a search out first."""
    return sys.argv[0].endswith("default_worker.py")


class PacedRings(ClassificationTask):
    """Two noisy rings; every training batch takes ``pause`` seconds.

    Args:
        pause: seconds a batch; there are ``BATCHES`` in an epoch.
    """

    def __init__(self, pause: float = 0.0) -> None:
        self._pause = float(os.environ.get(PAUSE, pause))
        self._seen = 0

    def splits(self, options: DataOptions) -> Splits:
        """200 points (200, 2) and the number of their ring, of which 160 train."""
        generator = torch.Generator().manual_seed(0)
        ring = torch.arange(32 * BATCHES * 5 // 4) % 2
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
        """The points as they are, after the pause."""
        if in_worker() and self._seen % BATCHES == 0 and TRAINED in os.environ:
            with Path(os.environ[TRAINED]).open("a", encoding="ascii") as file:
                file.write(f"{os.getpid()} {time.monotonic():.3f}\n")
        self._seen += 1
        time.sleep(self._pause)
        return inputs
