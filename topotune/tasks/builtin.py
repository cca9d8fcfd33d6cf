"""The registry of tasks, and how a name becomes one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from topotune.errors import PluginError
from topotune.plugins import call_with_options, find_class
from topotune.tasks.analytic import AnalyticTask, Quadratic, Rosenbrock
from topotune.tasks.base import Task
from topotune.tasks.classification import ImageTask
from topotune.tasks.images import (
    Cifar10,
    Digits,
    DigitsRolled,
    FashionMnist,
    Kmnist,
    Mnist,
    Mnist5k,
)

TASKS: dict[str, type[ImageTask] | type[AnalyticTask]] = {
    "cifar10": Cifar10,
    "digits": Digits,
    "digits_rolled": DigitsRolled,
    "fashion_mnist": FashionMnist,
    "kmnist": Kmnist,
    "mnist": Mnist,
    "mnist5k": Mnist5k,
    "quadratic": Quadratic,
    "rosenbrock": Rosenbrock,
}


@dataclass(frozen=True)
class TaskInfo:
    """What ``topotune tasks`` shows of a built-in task.

    Attributes:
        name: what a search file calls it.
        metric: headline metric; a search file's objective is ``val_<metric>``.
        direction: "maximize" or "minimize".
        models: models it offers, the default first.
        summary: one line.
        source: where its data come from.
    """

    name: str
    metric: str
    direction: str
    models: tuple[str, ...]
    summary: str
    source: str


def build_task(name: str, options: Mapping[str, object]) -> Task:
    """The task of a search file or trial; loads no data.

    Args:
        name: a key of :data:`TASKS`, or ``package.module:Class`` of a subclass of ``Task``.
        options: the constructor's keyword arguments.

    Raises:
        UnknownNameError: no built-in task has this name.
        PluginError: the import path does not lead to a complete subclass of ``Task``.
        ConfigError: the task does not take these options or values.
    """
    found: type[Task] = find_class("task", name, TASKS, Task)  # type: ignore[type-abstract]
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise PluginError(f"task {name!r} is incomplete: it does not define {missing}")
    return call_with_options(found, options, place="task.options", what=f"task {name!r}")


def describe_tasks() -> list[TaskInfo]:
    """All built-in tasks by name; loads no data and imports no data library."""
    return [
        TaskInfo(
            name=name,
            metric=task.metric,
            direction=task.direction,
            models=tuple(sorted(task.models, key=lambda model: model != task.default_model)),
            summary=(inspect.getdoc(task) or "").splitlines()[0],
            source=task.source,
        )
        for name, task in sorted(TASKS.items())
    ]
