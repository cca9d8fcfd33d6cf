"""Loss and metrics of a split."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from topotune.data.splits import TensorPair
from topotune.tasks.base import Task

EVALUATION_BATCH = 4096
"""Rows a batch when no gradient is needed."""


def evaluate(
    task: Task, model: nn.Module, rows: TensorPair, beat: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Loss and metrics of a split: means over its rows, without gradients or augmentation.

    The model is left in the mode (training or evaluation) it came in. ``beat`` is called after
    every batch.
    """
    mode = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    with torch.inference_mode():
        for start in range(0, len(rows), EVALUATION_BATCH):
            part = rows.rows(start, min(start + EVALUATION_BATCH, len(rows)))
            outputs = model(task.prepare(part.inputs))
            values = {"loss": task.loss(outputs, part.targets)}
            values |= task.metrics(outputs, part.targets)
            for name, value in values.items():
                weighted = value.double() * len(part)
                sums[name] = sums[name] + weighted if name in sums else weighted
            beat()
    model.train(mode)
    return {name: value.item() / len(rows) for name, value in sums.items()}
