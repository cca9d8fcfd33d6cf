"""The paper's two synthetic problems, whose minima are known exactly.

Neither has data. A row of a split is the number of a step: with ``train.batch_size: 1`` an epoch
is ``steps_per_epoch`` optimizer steps, with a larger batch as many times fewer. The loss does not
depend on the row, so validation and test are one row each and cost one evaluation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from topotune.data import Splits, TensorPair
from topotune.errors import ConfigError, UnknownNameError
from topotune.plugins import call_with_options, whole_number
from topotune.records import Value
from topotune.tasks.base import DataOptions, Task


class AnalyticTask(Task):
    """Move one point to a known minimum; the headline metric is the distance that is left.

    Args:
        steps_per_epoch: training rows.

    Attributes:
        source: where the data come from, in words.
        models: the models that this task offers by name.
        default_model: the model of a search file that names none.
    """

    metric = "distance"
    direction = "minimize"
    source: ClassVar[str] = "a formula"
    models: ClassVar[tuple[str, ...]] = ("point",)
    default_model: ClassVar[str] = "point"

    def __init__(self, steps_per_epoch: int = 200) -> None:
        self._steps = whole_number("task.options.steps_per_epoch", steps_per_epoch, low=1)

    @abstractmethod
    def minimum(self) -> Tensor:
        """The exact minimiser, (dim,), in torch's default dtype; the loss is zero there."""

    @abstractmethod
    def point(self) -> nn.Module:
        """A model whose only parameter, ``point``, is at its start."""

    def splits(self, options: DataOptions) -> Splits:
        """Step numbers (n, 1), dealt out at random, and the minimiser as target (n, dim)."""
        generator = torch.Generator().manual_seed(options.split_seed)
        numbers = torch.randperm(self._steps + 2, generator=generator)
        inputs = numbers.to(torch.get_default_dtype())[:, None]
        rows = TensorPair(inputs, self.minimum().repeat(len(inputs), 1))
        val, test = self._steps, self._steps + 1
        return Splits(rows.rows(0, val), rows.rows(val, test), rows.rows(test, test + 1))

    def model(self, name: str | None, options: Mapping[str, Value]) -> nn.Module:
        """``point``, which takes no options."""
        if name is not None and name not in self.models:
            raise UnknownNameError("model", name, self.models)
        return call_with_options(self.point, options, place="model", what="model 'point'")


class Quadratic(AnalyticTask):
    """Least squares |Ap - b|^2 / 2 with a chosen condition number (paper, "Quadratic Basin").

    The model's outputs are (n, 2, dim): the residual Ap - b, and p. A is square with random
    orthogonal factors, the minimiser is standard normal, and b is A times it. Every trial starts
    from a standard normal point of its own seed.

    Args:
        dim: length of p.
        condition: largest over smallest eigenvalue of the Hessian A'A; the largest is 1.
        problem_seed: seed of A and of the minimiser.
        steps_per_epoch: training rows.

    Raises:
        ConfigError: ``dim`` or ``steps_per_epoch`` below 1, ``problem_seed`` below 0, or
            ``condition`` below 1.
    """

    def __init__(
        self,
        dim: int = 10,
        condition: float = 100.0,
        problem_seed: int = 0,
        steps_per_epoch: int = 200,
    ) -> None:
        super().__init__(steps_per_epoch)
        whole_number("task.options.dim", dim, low=1)
        whole_number("task.options.problem_seed", problem_seed, low=0)
        number = isinstance(condition, int | float) and not isinstance(condition, bool)
        if not (number and 1 <= condition < float("inf")):
            raise ConfigError(
                "task.options.condition",
                f"must be a finite number of at least 1 (got {condition!r})",
            )
        generator = torch.Generator().manual_seed(problem_seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        left, right = (torch.linalg.qr(normal(dim, dim)).Q for _ in range(2))
        # Singular values of A are the square roots of the Hessian's eigenvalues.
        singular = torch.logspace(0.0, -1.0, dim, base=condition**0.5, dtype=torch.float64)
        self._matrix = left * singular @ right.T
        self._minimum = normal(dim)

    def minimum(self) -> Tensor:
        """The point where Ap = b."""
        return self._minimum.to(torch.get_default_dtype())

    def point(self) -> nn.Module:
        """A :class:`LeastSquares` at a standard normal point."""
        return LeastSquares(self._matrix, self._matrix @ self._minimum)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half the squared length of the residual."""
        return 0.5 * outputs[:, 0].square().sum(dim=1).mean()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """``distance`` of p to the minimiser and ``residual``, the length of Ap - b."""
        return {
            "distance": (outputs[:, 1] - targets).norm(dim=1).mean(),
            "residual": outputs[:, 0].norm(dim=1).mean(),
        }


class Rosenbrock(AnalyticTask):
    """The curved valley (1-x)^2 + 100(y-x^2)^2 with its minimum at (1, 1) (paper, same title).

    The model's outputs are (n, 2): x and y. Every trial starts from (-1.2, 1).

    Args:
        steps_per_epoch: training rows.

    Raises:
        ConfigError: ``steps_per_epoch`` is not a whole number of at least 1.
    """

    def minimum(self) -> Tensor:
        """(1, 1)."""
        return torch.ones(2)

    def point(self) -> nn.Module:
        """A :class:`Point` at (-1.2, 1), the customary start."""
        return Point(torch.tensor([-1.2, 1.0]))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The function's value."""
        x, y = outputs.unbind(dim=1)
        return ((1 - x).square() + 100 * (y - x.square()).square()).mean()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """``distance`` to the minimum, and ``off_valley``, |y - x^2|: how far the point is from
        the valley's floor, where an optimizer that oscillates does not stay."""
        x, y = outputs.unbind(dim=1)
        return {
            "distance": (outputs - targets).norm(dim=1).mean(),
            "off_valley": (y - x.square()).abs().mean(),
        }


class Point(nn.Module):
    """A point that is itself the output, once a row.

    Args:
        start: (dim,).
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.point = nn.Parameter(start.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, 1) to (n, dim); only n matters."""
        return self.point.expand(len(inputs), -1)


class LeastSquares(nn.Module):
    """A standard normal point p, from the global generator, with the residual of Ap = b.

    Args:
        matrix: A, (dim, dim).
        offset: b, (dim,).
    """

    matrix: Tensor
    offset: Tensor

    def __init__(self, matrix: Tensor, offset: Tensor) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        self.point = nn.Parameter(torch.randn(matrix.shape[1]))
        self.register_buffer("matrix", matrix.to(dtype))
        self.register_buffer("offset", offset.to(dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, 1) to (n, 2, dim), the residual and p; only n matters."""
        both = torch.stack([self.matrix @ self.point - self.offset, self.point])
        return both.expand(len(inputs), -1, -1)
