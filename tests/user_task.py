"""A task of a user's own, as the README shows it; tests load it as "tests.user_task:Rings"."""

from collections.abc import Mapping

import torch
from torch import nn

from topotune.data import SplitPlan, Splits, TensorPair, stratified_splits
from topotune.models import build_model
from topotune.tasks import ClassificationTask, DataOptions


class Rings(ClassificationTask):
    """Does a point lie on the inner or on the outer of two noisy rings?"""

    def __init__(self, points: int = 1000, noise: float = 0.1) -> None:
        self.points, self.noise = points, noise

    def splits(self, options: DataOptions) -> Splits:
        generator = torch.Generator().manual_seed(0)
        ring = torch.arange(self.points) % 2
        angle = 2 * torch.pi * torch.rand(self.points, generator=generator)
        radius = 1 + ring + self.noise * torch.randn(self.points, generator=generator)
        points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        return stratified_splits(TensorPair(points, ring), SplitPlan(seed=options.split_seed))

    def model(self, name: str | None, options: Mapping[str, object]) -> nn.Module:
        return build_model(name or "mlp", options, in_features=2, classes=2)
