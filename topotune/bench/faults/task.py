"""A small task at a known pace, with faults on request: what the faulted searches train."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from topotune.data import SplitPlan, Splits, TensorPair, stratified_splits
from topotune.models import build_model
from topotune.tasks import ClassificationTask, DataOptions

IMPORT_PATH = "topotune.bench.faults.task:PacedRings"
BATCHES = 5
"""Training batches of an epoch, of 32 points each."""


class PacedRings(ClassificationTask):
    """Two noisy rings; every training batch takes ``pause`` seconds.

    Args:
        pause: seconds a batch; there are ``BATCHES`` in an epoch.
    """

    def __init__(self, pause: float = 0.0) -> None:
        self._pause = pause

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
        time.sleep(self._pause)
        return inputs
