"""From a spec to the parts that train: checked, seeded and placed on the device."""

from __future__ import annotations

import math

import torch
from torch import nn

from topotune.data.splits import TensorPair
from topotune.errors import ConfigError, TopotuneError, in_one_line
from topotune.records import TrialSpec
from topotune.seeding import seed_everything
from topotune.tasks import build_task
from topotune.tasks.base import DataOptions, Task
from topotune.train.loop import LoopParts
from topotune.train.method import Method
from topotune.train.methods import build_method
from topotune.train.process import capture_generators, resolve_device, restore_generators
from topotune.train.schedule import find_schedule

PROBE_ROWS = 32
"""First rows of the training split that a learner may measure on after every epoch."""


def check_spec(spec: TrialSpec) -> None:
    """Check the numbers of a spec that need no data and no model.

    Raises:
        ConfigError: a number is out of its range or not a number.
        UnknownNameError: the schedule does not exist.
    """
    for place, seed in (("seed", spec.seed), ("split_seed", spec.split_seed)):
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise ConfigError(place, f"must be a whole number from 0 to 2**63 - 1 (got {seed!r})")
    for place, value, least in (
        ("epochs", spec.epochs, 1),
        ("threads", spec.threads, 0),
        ("train.batch_size", spec.train.batch_size, 1),
        ("overhead.blocks", spec.overhead.blocks, 0),
        ("overhead.steps", spec.overhead.steps, 1),
        ("overhead.warmup", spec.overhead.warmup, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(place, f"must be a whole number of at least {least} (got {value!r})")
    clip = spec.train.grad_clip
    if clip is not None and not (
        isinstance(clip, int | float) and math.isfinite(clip) and clip > 0
    ):
        raise ConfigError(
            "train.grad_clip",
            f"must be a positive number (got {clip!r})",
            "Leave it out to clip nothing",
        )
    find_schedule(spec.train.schedule)


def check_buildable(spec: TrialSpec, *, check_device: bool = True) -> None:
    """Raise now what :func:`~topotune.train.trial.open_trial` would raise in a worker, data apart.

    Builds the method, the task, the model and the optimizer on the CPU and drops them; loads no
    data and leaves the global random generators as they were.

    Args:
        spec: what a trial would train.
        check_device: whether the device must be in this process; a driver on a machine without
            a GPU may start workers on one that has it.

    Raises:
        UnstableError: dynamics that cannot settle; a search may have others that can.
        UserError: an unknown name, a bad value or option, or a missing device.
    """
    check_spec(spec)
    method = build_method(spec)
    if check_device:
        resolve_device(spec.device)
    cpu = torch.device("cpu")
    states = capture_generators(cpu)
    try:
        task = build_task(spec.task, spec.task_options)
        method.optimizer(_model(method, task).parameters())
    finally:
        restore_generators(states, cpu)


def assemble(method: Method, device: torch.device) -> LoopParts:
    """Load the data, and build model, learner and optimizer from the seed of the method's spec.

    The model is initialised on the CPU and then moved, so that every device starts alike.

    Raises:
        UserError: the spec names something that does not exist, breaks a rule, or leads to an
            empty split.
    """
    spec = method.spec
    task = build_task(spec.task, spec.task_options)
    splits = task.splits(data_options(spec))
    for name, rows in (("training", splits.train), ("validation", splits.val)):
        if len(rows) == 0:
            raise ConfigError(
                f"task {spec.task!r}", f"its {name} split is empty", "Give it more examples"
            )
    train = splits.train.to(device)
    probe = probe_rows(task, train)  # before the seed is set: what preparing draws has no effect
    model = make_model(method, task).to(device)
    return LoopParts(
        task=task,
        model=model,
        learner=method.learner(task, probe),
        optimizer=method.optimizer(model.parameters()),
        train=train,
        val=splits.val.to(device),
        device=device,
    )


def data_options(spec: TrialSpec) -> DataOptions:
    """Where the task finds its data and how it splits them."""
    return DataOptions(spec.data_dir, spec.download, spec.split_seed)


def probe_rows(task: Task, train: TensorPair) -> TensorPair:
    """The first rows of the training split, prepared and not augmented; the same on a resume."""
    rows = train.rows(0, min(PROBE_ROWS, len(train)))
    return TensorPair(task.prepare(rows.inputs), rows.targets)


def make_model(method: Method, task: Task) -> nn.Module:
    """The method's model on the CPU, initialised from the spec's seed alone."""
    seed_everything(method.spec.seed)
    return _model(method, task)


def _model(method: Method, task: Task) -> nn.Module:
    """The method's model for a task, whose code may be a user's.

    Raises:
        UserError: it is no module, or it cannot be built.
    """
    place = f"task {method.spec.task!r}: its model"
    try:
        model = method.model(task)
    except TopotuneError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(place, f"cannot be built: {in_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(place, f"must be a torch.nn.Module (got {model!r:.80})")
    return model
