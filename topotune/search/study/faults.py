"""What a search file names and nothing knows, and the values that a constructor refuses: all of
them, each by its key in the file."""

from __future__ import annotations

import dataclasses

from topotune.config.models import SearchConfig
from topotune.errors import (
    ConfigError,
    FieldError,
    PluginError,
    UnknownNameError,
    UnstableError,
    UserError,
    nearest,
)
from topotune.records import TrainOptions, TrialSpec

MOST = 50
"""Faults of one spec that are looked for."""
_STAND_INS: dict[str, tuple[str | None, str]] = {
    "task": ("digits", "task_options"),
    "model": (None, "model_options"),
    "method": ("adam", "params"),
}
"""What is built in place of a task, model or method that is unknown and near to no known one, and
where the options are that go with it."""


def faults_at(config: SearchConfig, spec: TrialSpec) -> tuple[list[FieldError], TrialSpec | None]:
    """What keeps a trial from being built; loads no data.

    Each refused name or value is left out and the rest is built, until nothing is refused.

    Returns:
        The faults; and the rest that can be built, None where its metrics may be others.

    Raises:
        UnstableError: its dynamics cannot settle, and nothing is wrong with it otherwise.
        UserError: not the file but the environment must change.
    """
    from topotune.train.assemble import check_buildable

    found: dict[tuple[str | int, ...], FieldError] = {}
    other = False
    while len(found) < MOST:
        try:
            check_buildable(spec, check_device=False)
        except UnstableError:
            if found:
                break
            raise
        except (ConfigError, UnknownNameError, PluginError) as error:
            path = _path(error, config, spec)
            # What is refused next to a stand-in or without an option may be due to that.
            due = found and not (isinstance(error, UnknownNameError) or _in_file(path))
            if due or path in found:
                break
            problem, fix = (
                (error.problem, error.fix) if isinstance(error, ConfigError) else (str(error), "")
            )
            found[path] = FieldError(path, problem, fix)
            near = isinstance(error, UnknownNameError) and nearest(error.name, error.known)
            other = other or (_shapes_metrics(path) and not near)
            spec = _without(spec, path, error)
        else:
            return list(found.values()), None if other else spec
    return list(found.values()), None


def _shapes_metrics(path: tuple[str | int, ...]) -> bool:
    """Whether what stands there decides which metrics a trial reports."""
    return path[0] in ("task", "method") or str(path[-1]).startswith("task.")


def _path(error: UserError, config: SearchConfig, spec: TrialSpec) -> tuple[str | int, ...]:
    """The key in the file that an error is about."""
    name, about = "", str(error)
    if isinstance(error, UnknownNameError):
        name, about = error.kind, error.kind
    elif isinstance(error, ConfigError):
        about = error.place
        name = about.removeprefix("method parameter ").replace("task.options.", "task.")
    for block, names in (("space", config.space), ("fixed", config.fixed)):
        for full in (name, f"train.{name}"):
            if full in names:
                return block, full
    head, _, leaf = name.partition(".")
    options = {"task": config.task.options, "model": config.model.options}.get(head, {})
    if leaf in options:
        return head, "options", leaf
    if leaf and head in ("train", "overhead"):
        return head, leaf
    if isinstance(error, ConfigError | UnknownNameError):
        named = [head.partition(" ")[0]]
    else:  # of an import path
        places = {"task": spec.task, "model": spec.model, "method": spec.method}
        named = [key for key, value in places.items() if value and repr(value) in about]
    if "task" in named:
        return "task", "name"
    return ("model", "name") if "model" in named else ("method",)


def _in_file(path: tuple[str | int, ...]) -> bool:
    """Whether it is the key of one parameter or option."""
    return path[0] in ("space", "fixed") or path[1:2] == ("options",)


def _without(spec: TrialSpec, path: tuple[str | int, ...], error: UserError) -> TrialSpec:
    """The spec without what stands at a path; the task, model or method that was probably meant."""
    if path in (("task", "name"), ("model", "name"), ("method",)):
        part = str(path[0])
        stand_in, options = _STAND_INS[part]
        if isinstance(error, UnknownNameError) and (near := nearest(error.name, error.known)):
            return dataclasses.replace(spec, **{part: near})  # type: ignore[arg-type]
        return dataclasses.replace(spec, **{part: stand_in, options: {}})  # type: ignore[arg-type]
    if path[0] in ("train", "overhead"):
        return spec
    full = str(path[1]) if path[0] in ("space", "fixed") else f"{path[0]}.{path[2]}"
    scope, _, leaf = full.rpartition(".")
    if scope == "train":
        train = dataclasses.replace(spec.train, **{leaf: getattr(TrainOptions(), leaf)})
        return dataclasses.replace(spec, train=train)
    field = {"": "params", "task": "task_options", "model": "model_options"}[scope]
    kept = {key: value for key, value in getattr(spec, field).items() if key != leaf}
    return dataclasses.replace(spec, **{field: kept})  # type: ignore[arg-type]
