"""The synthetic problems have the minima, spectra and gradients that they state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.cases import PROBLEMS, Problem, valley
from topotune.errors import ConfigError
from topotune.tasks import DataOptions, build_task
from topotune.tasks.analytic import LeastSquares, Quadratic, Rosenbrock


def _at(task: Quadratic | Rosenbrock, where: Tensor | None = None) -> tuple[nn.Module, Tensor]:
    """The task's model, moved to a point, and its loss on one row."""
    model = task.model(None, {})
    if where is not None:
        with torch.no_grad():
            next(model.parameters()).copy_(where)
    row = task.splits(DataOptions()).val
    return model, task.loss(model(row.inputs), row.targets)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_cases_state_their_minimum(problem: Problem) -> None:
    point = problem.minimiser.clone().requires_grad_()
    loss = problem.loss(point)
    (gradient,) = torch.autograd.grad(loss, point)
    assert loss.item() == pytest.approx(problem.minimum, abs=1e-12)
    assert gradient.norm().item() < 1e-10
    assert problem.loss(problem.start).item() > problem.minimum
    eigenvalues = torch.linalg.eigvalsh(
        torch.autograd.functional.hessian(problem.loss, problem.start)  # type: ignore[no-untyped-call]
    )
    assert bool((eigenvalues > 0).all()) or not problem.convex


@pytest.mark.parametrize(("dim", "condition"), [(1, 1.0), (2, 7.0), (10, 100.0), (5, 1e4)])
def test_quadratic_has_the_stated_spectrum(dim: int, condition: float) -> None:
    model = Quadratic(dim=dim, condition=condition).model(None, {})
    assert isinstance(model, LeastSquares)
    matrix = model.matrix.double()
    eigenvalues = torch.linalg.eigvalsh(matrix.T @ matrix)
    assert eigenvalues[-1].item() == pytest.approx(1.0, rel=1e-5)
    assert (eigenvalues[-1] / eigenvalues[0]).item() == pytest.approx(condition, rel=1e-2)


def test_quadratic_minimum_is_exact() -> None:
    task = Quadratic(dim=6, condition=50.0)
    model, loss = _at(task, task.minimum())
    assert loss.item() < 1e-12
    row = task.splits(DataOptions()).test
    metrics = task.metrics(model(row.inputs), row.targets)
    assert metrics["distance"].item() == 0
    assert metrics["residual"].item() < 1e-6


def test_quadratic_loss_is_the_formula() -> None:
    task = Quadratic(dim=4)
    point = torch.tensor([1.0, -2.0, 0.5, 3.0])
    model, loss = _at(task, point)
    assert isinstance(model, LeastSquares)
    residual = model.matrix @ point - model.offset
    assert loss.item() == pytest.approx(0.5 * residual.dot(residual).item(), rel=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert model.point.grad is not None
    assert torch.allclose(model.point.grad, model.matrix.T @ residual, atol=1e-6)


def test_quadratic_problem_and_start_have_seeds_of_their_own() -> None:
    torch.manual_seed(0)
    one = Quadratic(problem_seed=1).model(None, {})
    torch.manual_seed(1)
    two = Quadratic(problem_seed=1).model(None, {})
    other = Quadratic(problem_seed=2).model(None, {})
    assert isinstance(one, LeastSquares)
    assert isinstance(two, LeastSquares)
    assert isinstance(other, LeastSquares)
    assert torch.equal(one.matrix, two.matrix)
    assert not torch.equal(one.matrix, other.matrix)
    assert not torch.equal(one.point, two.point)


def test_rosenbrock_start_value_and_gradient() -> None:
    model, loss = _at(Rosenbrock())
    problem = valley()
    start = problem.start.clone().requires_grad_()
    expected = problem.loss(start)
    (gradient,) = torch.autograd.grad(expected, start)
    assert loss.item() == pytest.approx(expected.item()) == pytest.approx(24.2)
    loss.backward()  # type: ignore[no-untyped-call]
    (point,) = model.parameters()
    assert point.grad is not None
    assert torch.allclose(point.grad.double(), gradient, rtol=1e-5)


def test_rosenbrock_minimum_and_metrics() -> None:
    task = Rosenbrock()
    _, loss = _at(task, task.minimum())
    assert loss.item() == 0
    model, _ = _at(task, torch.tensor([2.0, 1.0]))
    row = task.splits(DataOptions()).val
    metrics = task.metrics(model(row.inputs), row.targets)
    assert metrics["distance"].item() == 1
    assert metrics["off_valley"].item() == 3


@pytest.mark.parametrize("task", [Quadratic(steps_per_epoch=7), Rosenbrock(steps_per_epoch=7)])
def test_rows_are_steps(task: Quadratic | Rosenbrock) -> None:
    splits = task.splits(DataOptions(split_seed=3))
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [7, 1, 1]
    numbers = [int(i) for s in (splits.train, splits.val, splits.test) for i in s.inputs]
    assert sorted(numbers) == list(range(9))
    assert torch.equal(splits.train.targets[3], task.minimum())


@pytest.mark.parametrize("task", [Quadratic(), Rosenbrock()])
def test_the_batch_size_changes_neither_loss_nor_gradient(task: Quadratic | Rosenbrock) -> None:
    torch.manual_seed(0)
    model = task.model(None, {})
    train = task.splits(DataOptions()).train
    results = []
    for size in (1, 64):
        model.zero_grad()
        loss = task.loss(model(train.inputs[:size]), train.targets[:size])
        loss.backward()  # type: ignore[no-untyped-call]
        (point,) = model.parameters()
        assert point.grad is not None
        results.append((loss.detach(), point.grad.clone()))
    (one, many) = results
    assert torch.allclose(one[0], many[0])
    assert torch.allclose(one[1], many[1], rtol=1e-5)


@pytest.mark.parametrize("name", ["quadratic", "rosenbrock"])
def test_an_exact_method_reaches_the_minimum(name: str) -> None:
    torch.manual_seed(0)
    task = build_task(name, {})
    model = task.model(None, {})
    row = task.splits(DataOptions()).val
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        model.zero_grad()
        loss = task.loss(model(row.inputs), row.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    before = task.metrics(model(row.inputs), row.targets)["distance"].item()
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    after = task.metrics(model(row.inputs), row.targets)["distance"].item()
    assert after < 1e-3 < 1 < before


def test_the_point_takes_no_options() -> None:
    with pytest.raises(ConfigError, match="It takes no options"):
        Rosenbrock().model("point", {"start": 0})
