"""Rules of a search file that involve more than one block; each raises ValueError.

A message begins with the key that it is about, so that the file reader can find its line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from topotune.errors import did_you_mean
from topotune.records import Value
from topotune.redaction import address_with_secret, names_secret

if TYPE_CHECKING:
    from topotune.config import SearchConfig
    from topotune.config_space import Param


MAX_GRID = 100_000


class RuleError(ValueError):
    """A broken rule and the path of the key that it is about."""

    def __init__(self, path: tuple[str | int, ...], problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(problem)


def check_search(config: SearchConfig) -> None:
    """All rules across blocks.

    Raises:
        RuleError: the first broken rule.
    """
    _check_names(config)
    for name in config.fixed:
        if name in config.space and not config.space[name].when:
            raise RuleError(
                ("fixed", name), f"{name} stands in fixed and in space; remove one of them"
            )
    _check_conditions(config.space)
    for index, point in enumerate(config.warm_start):
        _check_point(config.space, point, ("warm_start", index))
    metrics = [objective.metric for objective in config.objective]
    for index, metric in enumerate(metrics):
        if metric in metrics[:index]:
            raise RuleError(("objective",), f"metric {metric!r} stands twice")
    for name, bound in config.constraints.items():
        if bound.min is not None and bound.max is not None and bound.min > bound.max:
            raise RuleError(
                ("constraints", name), f"min must not be above max ({bound.min} > {bound.max})"
            )
        if name.startswith("overhead_") and config.overhead.blocks == 0:
            raise RuleError(
                ("constraints", name), "needs the overhead measurement, but overhead.blocks is 0"
            )
    _check_sampler(config)
    _check_pruner(config)


def check_secrets(config: SearchConfig) -> None:
    """Nothing in a search file may be a secret: it is kept, uploaded and shown.

    Raises:
        RuleError: a text looks like one.
    """
    # The study's address has a rule of its own, which allows a user's name.
    for place, value in _texts(config.model_dump(exclude={"study"}), ()):
        names = [key for key in place if isinstance(key, str)]
        # What is searched is no secret, whatever its name.
        named = place[0] in ("task", "model", "fixed") and names_secret(names[-1])
        if value and (named or address_with_secret(value)):
            raise RuleError(
                place,
                "looks like a secret, and a search file is kept, uploaded and shown. Put it into "
                "the environment: MLFLOW_TRACKING_URI or MLFLOW_TRACKING_PASSWORD for the "
                "tracking server; a task of your own can read others from there",
            )


def _texts(
    value: object, place: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every text in nested plain data, and where it stands."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, (*place, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*place, index))


def _check_names(config: SearchConfig) -> None:
    from topotune.config import PARAM_NAME, TrainConfig

    train_names = set(TrainConfig.model_fields)
    for block, names in (("fixed", config.fixed), ("space", config.space)):
        for name in names:
            if not PARAM_NAME.fullmatch(name):
                raise RuleError(
                    (block, name),
                    f"parameter name {name!r} must be a name such as lr, or one with the prefix "
                    "model., task. or train., such as model.hidden",
                )
            scope, _, leaf = name.rpartition(".")
            if scope == "train" and leaf not in train_names:
                raise RuleError(
                    (block, name), f"unknown train option {leaf!r}{did_you_mean(leaf, train_names)}"
                )


def _check_conditions(space: Mapping[str, Param]) -> None:
    for name, param in space.items():
        for parent, wanted in param.when.items():
            place = ("space", name, "when", parent)
            if parent not in space:
                raise RuleError(
                    place,
                    f"condition on unknown parameter {parent!r}"
                    + did_you_mean(parent, (other for other in space if other != name)),
                )
            for value in wanted if isinstance(wanted, list) else [wanted]:
                if not holds(space[parent], value):
                    raise RuleError(place, f"{parent} never takes the value {value!r}")
    sampling_order(space)


def sampling_order(space: Mapping[str, Param]) -> list[str]:
    """Parameter names, each after those that its condition reads, else in file order.

    Raises:
        RuleError: conditions form a circle.
    """
    done: list[str] = []
    left = list(space)
    while left:
        ready = [name for name in left if all(parent in done for parent in space[name].when)]
        if not ready:
            raise RuleError(
                ("space", left[0], "when"), f"conditions form a circle among {', '.join(left)}"
            )
        done.append(ready[0])
        left.remove(ready[0])
    return done


def is_active(param: Param, chosen: Mapping[str, Value]) -> bool:
    """Whether a parameter's condition holds; an inactive parent is no match."""
    return all(
        parent in chosen
        and any(
            same(chosen[parent], value)
            for value in (wanted if isinstance(wanted, list) else [wanted])
        )
        for parent, wanted in param.when.items()
    )


def active_part(space: Mapping[str, Param], point: Mapping[str, Value]) -> dict[str, Value]:
    """A point without the values of parameters whose condition does not hold in it."""
    chosen: dict[str, Value] = {}
    for name in sampling_order(space):
        if name in point and is_active(space[name], chosen):
            chosen[name] = point[name]
    return chosen


def same(left: Value, right: Value) -> bool:
    """Equality that keeps True and 1 apart."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def holds(param: Param, value: Value) -> bool:
    """Whether ``value`` is one that the parameter can take."""
    if param.type == "categorical":
        return any(same(choice, value) for choice in param.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if param.type == "int" and not float(value).is_integer():
        return False
    if not param.low <= value <= param.high:
        return False
    if param.step is None:
        return True
    steps = (value - param.low) / param.step
    return abs(steps - round(steps)) < 1e-8


def describe(param: Param) -> str:
    """A parameter's range in a few words, such as ``float 1e-05 to 0.1, log``."""
    if param.type == "categorical":
        return "one of " + ", ".join(str(choice) for choice in param.choices)
    text = f"{param.type} {param.low:g} to {param.high:g}"
    text += ", log" if param.log else ""
    return text + (f", step {param.step:g}" if param.step not in (None, 1) else "")


def grid_axis(param: Param) -> int:
    """How many values a grid gives a parameter, which has choices or a step."""
    if param.type == "categorical":
        return len(param.choices)
    assert param.step is not None
    return int((param.high - param.low) / param.step + 1e-9) + 1


def grid_size(space: Mapping[str, Param]) -> int:
    """How many points a grid has."""
    return math.prod(grid_axis(param) for param in space.values())


def planned_trials(config: SearchConfig) -> int | None:
    """How many trials a search starts at most; None where only time limits it."""
    limit = config.budget.trials
    if config.sampler.name != "grid":
        return limit
    points = grid_size(config.space)
    return points if limit is None else min(points, limit)


def _check_point(
    space: Mapping[str, Param], point: Mapping[str, Value], place: tuple[str | int, ...]
) -> None:
    for name, value in point.items():
        if name not in space:
            raise RuleError(
                (*place, name), f"unknown parameter {name!r}{did_you_mean(name, space)}"
            )
        if not holds(space[name], value):
            raise RuleError(
                (*place, name), f"{value!r} is outside {name}'s range ({describe(space[name])})"
            )


def _check_sampler(config: SearchConfig) -> None:
    sampler, space = config.sampler.name, config.space
    if sampler == "grid":
        if config.warm_start:
            raise RuleError(("warm_start",), "a grid visits its points anyway; leave this out")
        for name, param in space.items():
            if param.when:
                raise RuleError(("space", name, "when"), "the grid sampler takes no conditions")
            if param.type == "float" and param.step is None:
                raise RuleError(
                    ("space", name), "the grid sampler needs a step for a float parameter"
                )
            if param.type == "int" and param.log:
                raise RuleError(
                    ("space", name), "the grid sampler takes no log scale; list choices instead"
                )
        if grid_size(space) > MAX_GRID:
            raise RuleError(("space",), f"the grid has more than {MAX_GRID} points; raise a step")
    if sampler == "cmaes":
        if len(config.objective) > 1:
            raise RuleError(("sampler",), "cmaes takes one objective; use tpe or nsga2 for several")
        if config.constraints:
            raise RuleError(("sampler",), "cmaes takes no constraints; use tpe, gp or nsga2")


def _check_pruner(config: SearchConfig) -> None:
    if len(config.objective) > 1 and config.pruner.name != "none":
        raise RuleError(
            ("pruner",),
            f"pruning compares one number, and there are {len(config.objective)} objectives; "
            "write pruner: none",
        )
    if config.pruner.name != "none" and config.pruner.min_epochs > config.budget.epochs:
        raise RuleError(
            ("pruner", "min_epochs"),
            f"must not be above budget.epochs ({config.pruner.min_epochs} > "
            f"{config.budget.epochs}), or nothing is ever pruned",
        )
