"""Problems with exact answers, for tests to parametrise over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A function with a known minimum; float64, so that tests can be strict.

    Attributes:
        name: for test ids.
        loss: (dim,) to a scalar.
        start: (dim,), where to begin.
        minimiser: (dim,), the exact answer.
        minimum: the value there.
        convex: whether the Hessian is constant and positive definite.
    """

    name: str
    loss: Callable[[Tensor], Tensor]
    start: Tensor
    minimiser: Tensor
    minimum: float
    convex: bool

    def __str__(self) -> str:
        return self.name


def bowl(dim: int = 4, condition: float = 10.0) -> Problem:
    """An axis-parallel quadratic, minimum 0 at (1, 2, ..., dim)."""
    curvature = torch.logspace(0, -1, dim, base=condition, dtype=torch.float64)
    centre = torch.arange(1, dim + 1, dtype=torch.float64)
    return Problem(
        name=f"bowl-{condition:g}",
        loss=lambda p: 0.5 * (curvature * (p - centre).square()).sum(),
        start=torch.zeros(dim, dtype=torch.float64),
        minimiser=centre,
        minimum=0.0,
        convex=True,
    )


def regression(rows: int = 12, dim: int = 3) -> Problem:
    """Least squares with a residual that stays; the answer is from the normal equations."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    target = torch.randn(rows, generator=generator, dtype=torch.float64)
    solution = torch.linalg.solve(matrix.T @ matrix, matrix.T @ target)

    def loss(p: Tensor) -> Tensor:
        return 0.5 * (matrix @ p - target).square().sum()

    start = torch.zeros(dim, dtype=torch.float64)
    return Problem("regression", loss, start, solution, loss(solution).item(), convex=True)


def valley() -> Problem:
    """Rosenbrock's function, minimum 0 at (1, 1)."""
    return Problem(
        name="rosenbrock",
        loss=lambda p: (1 - p[0]).square() + 100 * (p[1] - p[0].square()).square(),
        start=torch.tensor([-1.2, 1.0], dtype=torch.float64),
        minimiser=torch.ones(2, dtype=torch.float64),
        minimum=0.0,
        convex=False,
    )


PROBLEMS = (bowl(), bowl(condition=1000.0), regression(), valley())
