"""Recorded gradients and the comparison of an optimizer with the twin, for the optimizer tests.

All recorded numbers are exact in float32, so that one float64 run of the twin serves both types.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from topotune.optim import TopologicalAdam
from topotune.optim.reference import ReferenceTopologicalAdam

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

COUPLINGS = ("uniform", "exchange", "local")

SHAPES: tuple[tuple[int, ...], ...] = ((37, 11), (50,), ())
WEIGHT_SIZE = 0.05
"""Parameters as large as a network's initial weights."""


Shapes = tuple[tuple[int, ...], ...]


def starts(shapes: Shapes = SHAPES, size: float = WEIGHT_SIZE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [size * torch.randn(shape, generator=generator) for shape in shapes]


@functools.cache
def gradients(steps: int, scale: float, shapes: Shapes = SHAPES) -> list[list[Tensor]]:
    """A recording: for each step a float32 gradient of each shape."""
    generator = torch.Generator().manual_seed(11)
    return [
        [scale * torch.randn(shape, generator=generator) for shape in shapes] for _ in range(steps)
    ]


def parameters(values: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    return [nn.Parameter(value.detach().clone().to(dtype or value.dtype)) for value in values]


def replay(
    optimizer: Optimizer, tensors: Sequence[nn.Parameter], recording: Sequence[Sequence[Tensor]]
) -> None:
    """Step through recorded gradients."""
    for step in recording:
        for tensor, gradient in zip(tensors, step, strict=True):
            tensor.grad = gradient.to(tensor.dtype).clone()
        optimizer.step()


@dataclass
class Comparison:
    """The fast path and the float64 twin after the same gradients.

    Attributes:
        error: norm of the difference over the norm of the distance that the twin moved.
        fast, twin: the optimizers.
        worst_energy: the largest energy of a tensor in the twin.
    """

    error: float
    fast: TopologicalAdam
    twin: ReferenceTopologicalAdam
    worst_energy: float


@functools.cache
def _twin(
    scale: float, steps: int, size: float, shapes: Shapes, options: tuple[tuple[str, Any], ...]
) -> tuple[ReferenceTopologicalAdam, list[nn.Parameter]]:
    tensors = parameters(starts(shapes, size), torch.float64)
    twin = ReferenceTopologicalAdam(tensors, **dict(options))
    replay(twin, tensors, gradients(steps, scale, shapes))
    return twin, tensors


def compare(
    dtype: torch.dtype,
    scale: float,
    steps: int = 500,
    size: float = WEIGHT_SIZE,
    shapes: Shapes = SHAPES,
    **options: Any,
) -> Comparison:
    """Run both on one recording."""
    begin = starts(shapes, size)
    quick = parameters(begin, dtype)
    fast = TopologicalAdam(quick, **options)
    replay(fast, quick, gradients(steps, scale, shapes))
    twin, slow = _twin(scale, steps, size, shapes, tuple(options.items()))
    pairs = list(zip(quick, slow, begin, strict=True))
    off = sum((q.detach().double() - s.detach()).square().sum().item() for q, s, _ in pairs)
    moved = sum((s.detach() - b.double()).square().sum().item() for _, s, b in pairs)
    worst = max(float(twin.state[p]["energy"]) for p in slow)
    return Comparison((off / moved) ** 0.5, fast, twin, worst)
