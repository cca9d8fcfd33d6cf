"""Tasks: model, data, loss and metrics."""

from topotune.tasks.base import DataOptions, Task
from topotune.tasks.builtin import TASKS, TaskInfo, build_task, describe_tasks
from topotune.tasks.classification import ClassificationTask, ImageTask

__all__ = [
    "TASKS",
    "ClassificationTask",
    "DataOptions",
    "ImageTask",
    "Task",
    "TaskInfo",
    "build_task",
    "describe_tasks",
]
