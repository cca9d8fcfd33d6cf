"""Rules of a search file that involve more than one block, each with the key that it is about.

A rule yields every place that breaks it, so that a file's faults are all seen at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING

from topotune.config.space import PARAM_NAME, FloatParam, IntParam, Param, Scalar
from topotune.errors import did_you_mean
from topotune.records import Value

if TYPE_CHECKING:
    from topotune.config.models import SearchConfig


MOST_STEPS = 1e15
"""Steps of a range of floats, beyond which neighbours are one float."""


MAX_GRID = 100_000


class RuleError(ValueError):
    """A broken rule and the path of the key that it is about."""

    def __init__(self, path: tuple[str | int, ...], problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(problem)


class BrokenRulesError(ValueError):
    """Every broken rule of a search file."""

    def __init__(self, broken: list[RuleError]) -> None:
        self.broken = broken
        super().__init__("; ".join(map(str, broken)))


def check_search(config: SearchConfig, *, saved: bool = False) -> None:
    """All rules across blocks.

    Args:
        config: the search.
        saved: it exists: what only a new search is refused for does not stop it.

    Raises:
        BrokenRulesError: with every broken rule.
    """
    rules = (*_RULES, *(() if saved else _RULES_OF_NEW))
    if broken := [error for rule in rules for error in rule(config)]:
        raise BrokenRulesError(broken)


def _check_fixed(config: SearchConfig) -> Iterator[RuleError]:
    for name in config.fixed:
        if name in config.space and not config.space[name].when:
            yield RuleError(
                ("fixed", name), f"{name} stands in fixed and in space; remove one of them"
            )


def _check_metrics(config: SearchConfig) -> Iterator[RuleError]:
    metrics = [objective.metric for objective in config.objective]
    for index, metric in enumerate(metrics):
        if metric in metrics[:index]:
            yield RuleError(("objective",), f"metric {metric!r} stands twice")
    for name, bound in config.constraints.items():
        if bound.min is not None and bound.max is not None and bound.min > bound.max:
            yield RuleError(
                ("constraints", name), f"min must not be above max ({bound.min} > {bound.max})"
            )
        if name.startswith("overhead_") and config.overhead.blocks == 0:
            yield RuleError(
                ("constraints", name), "needs the overhead measurement, but overhead.blocks is 0"
            )


def _check_test_split(config: SearchConfig) -> Iterator[RuleError]:
    places: list[tuple[tuple[str | int, ...], str]] = [
        (("objective", index, "metric"), objective.metric)
        for index, objective in enumerate(config.objective)
    ]
    for place, metric in [*places, *((("constraints", name), name) for name in config.constraints)]:
        if metric.startswith("test_"):
            yield RuleError(
                place,
                f"{metric!r} is closed to a search: one that chose by the test split would fit it, "
                "and no data would be left to judge its winner by. Write "
                f"val_{metric.removeprefix('test_')}; 'topotune export' and 'topotune train' open "
                "the test split",
            )


def _check_names(config: SearchConfig) -> Iterator[RuleError]:
    train_names = set(type(config.train).model_fields)
    for block, names in (("fixed", config.fixed), ("space", config.space)):
        for name in names:
            if not PARAM_NAME.fullmatch(name):
                yield RuleError(
                    (block, name),
                    f"parameter name {name!r} must be a name such as lr, or one with the prefix "
                    "model., task. or train., such as model.hidden",
                )
            scope, _, leaf = name.rpartition(".")
            if scope == "train" and leaf not in train_names:
                yield RuleError(
                    (block, name), f"unknown train option {leaf!r}{did_you_mean(leaf, train_names)}"
                )


def _check_conditions(config: SearchConfig) -> Iterator[RuleError]:
    space, known = config.space, True
    for name, param in space.items():
        for parent, wanted in param.when.items():
            place = ("space", name, "when", parent)
            if parent not in space:
                yield RuleError(
                    place,
                    f"condition on unknown parameter {parent!r}"
                    + did_you_mean(parent, (other for other in space if other != name)),
                )
                known = False
                continue
            for value in wanted if isinstance(wanted, list) else [wanted]:
                if not holds(space[parent], value):
                    yield RuleError(
                        place,
                        f"{parent} never takes the value {quoted(value)}"
                        + _quotes(space[parent], value),
                    )
    if known:
        try:
            sampling_order(space)
        except RuleError as error:
            yield error


def _check_continuous(config: SearchConfig) -> Iterator[RuleError]:
    for name, param in config.space.items():
        for parent, wanted in param.when.items():
            on = config.space.get(parent)
            if on is not None and on.type == "float" and on.step is None:
                yield RuleError(
                    ("space", name, "when", parent),
                    f"{parent} is continuous ({describe(on)}) and as good as never takes one exact "
                    f"value, so that {name} would never be searched; give {parent} a step, or "
                    "choices (type: categorical)",
                )
            elif wanted == []:
                yield RuleError(
                    ("space", name, "when", parent), "an empty list never holds; name a value"
                )


def _check_steps(config: SearchConfig) -> Iterator[RuleError]:
    for name, param in config.space.items():
        if param.type == "categorical" or param.step is None:
            continue
        place, bounds = ("space", name, "step"), f"({param.low} to {param.high})"
        if _too_many_steps(param):
            yield RuleError(
                place,
                f"step {param.step} is too small for the range {bounds}; leave it out for a range "
                "without steps",
            )
        elif last_value(param) <= param.low:
            yield RuleError(
                place,
                f"step {param.step} exceeds the range {bounds}, so that only {param.low} would be "
                f"tried; lower the step, or move {name} to fixed",
            )


def _too_many_steps(param: FloatParam | IntParam) -> bool:
    if param.type == "int" or param.step is None:
        return False
    return not param.high / param.step - param.low / param.step <= MOST_STEPS


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


def last_value(param: FloatParam | IntParam) -> float:
    """The largest value that a parameter takes: ``high``, or the last step below it."""
    if param.type == "int":
        return param.high - (param.high - param.low) % param.step
    if param.step is None or _too_many_steps(param):
        return param.high
    # In decimal, as Optuna does: 0.3 is three steps of 0.1 there.
    low, high, step = (Decimal(str(number)) for number in (param.low, param.high, param.step))
    rest = (high - low) % step
    return float(high - rest) if rest else param.high


def unreached_ends(config: SearchConfig) -> Iterator[str]:
    """A line for each parameter whose steps do not end at its ``high``."""
    for name, param in config.space.items():
        if param.type != "categorical" and last_value(param) != param.high:
            yield (
                f"space.{name}: steps of {param.step:g} from {param.low:g} do not reach high "
                f"{param.high:g}; the last value is {last_value(param):g}"
            )


def is_active(param: Param, chosen: Mapping[str, Value]) -> bool:
    """Whether a parameter's condition holds; an inactive parent is no match."""
    return all(
        parent in chosen
        and any(
            _meets(chosen[parent], value)
            for value in (wanted if isinstance(wanted, list) else [wanted])
        )
        for parent, wanted in param.when.items()
    )


def _meets(chosen: Value, wanted: Value) -> bool:
    """Whether a sampled value is the wanted one: three steps of 0.1 are not exactly 0.3."""
    if isinstance(chosen, float) and isinstance(wanted, int | float):
        return not isinstance(wanted, bool) and math.isclose(chosen, wanted, abs_tol=1e-15)
    return same(chosen, wanted)


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
        return "one of " + ", ".join(plain(choice) for choice in param.choices)
    text = f"{param.type} {param.low:g} to {param.high:g}"
    text += ", log" if param.log else ""
    return text + (f", step {param.step:g}" if param.step not in (None, 1) else "")


def grid_axis(param: Param) -> int:
    """How many values a grid gives a parameter, which has choices or a step."""
    if param.type == "categorical":
        return len(param.choices)
    assert param.step is not None
    return round((last_value(param) - param.low) / param.step) + 1


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


def plain(value: Value) -> str:
    """A value as a search file has it, a text without quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def one_of(wanted: Scalar | list[Scalar | None] | None) -> str:
    """The value or values of a condition, such as ``ring or null``."""
    return " or ".join(map(plain, wanted if isinstance(wanted, list) else [wanted]))


def quoted(value: Value) -> str:
    """A value as a search file has it, a text in quotes."""
    return repr(value) if isinstance(value, str) else json.dumps(value)


def _quotes(param: Param, value: Value) -> str:
    """What to write where a choice is a text and a number or word without quotes stands."""
    if isinstance(value, str) or param.type != "categorical" or plain(value) not in param.choices:
        return ""
    return f"; put it in quotes: {plain(value)!r}"


def _check_points(config: SearchConfig) -> Iterator[RuleError]:
    space = config.space
    for index, point in enumerate(config.warm_start):
        for name, value in point.items():
            place = ("warm_start", index, name)
            if name not in space:
                yield RuleError(place, f"unknown parameter {name!r}{did_you_mean(name, space)}")
            elif not holds(space[name], value):
                yield RuleError(
                    place,
                    f"{quoted(value)} is outside {name}'s range ({describe(space[name])})"
                    + _quotes(space[name], value),
                )


def _check_sampler(config: SearchConfig) -> Iterator[RuleError]:
    sampler, space = config.sampler.name, config.space
    if sampler == "grid":
        if config.warm_start:
            yield RuleError(("warm_start",), "a grid visits its points anyway; leave this out")
        for name, param in space.items():
            if param.when:
                yield RuleError(("space", name, "when"), "the grid sampler takes no conditions")
            if param.type == "float" and param.step is None:
                yield RuleError(
                    ("space", name), "the grid sampler needs a step for a float parameter"
                )
            if param.type == "int" and param.log:
                yield RuleError(
                    ("space", name), "the grid sampler takes no log scale; list choices instead"
                )
        countable = all(
            param.type == "categorical" or (param.step is not None and not _too_many_steps(param))
            for param in space.values()
        )
        if countable and grid_size(space) > MAX_GRID:
            yield RuleError(("space",), f"the grid has more than {MAX_GRID} points; raise a step")
    if sampler == "cmaes":
        if len(config.objective) > 1:
            yield RuleError(("sampler",), "cmaes takes one objective; use tpe or nsga2 for several")
        if config.constraints:
            yield RuleError(("sampler",), "cmaes takes no constraints; use tpe, gp or nsga2")


def _check_pruner(config: SearchConfig) -> Iterator[RuleError]:
    if len(config.objective) > 1 and config.pruner.name != "none":
        yield RuleError(
            ("pruner",),
            f"pruning compares one number, and there are {len(config.objective)} objectives; "
            "write pruner: none",
        )
    if config.pruner.name != "none" and config.pruner.min_epochs > config.budget.epochs:
        yield RuleError(
            ("pruner", "min_epochs"),
            f"must not be above budget.epochs ({config.pruner.min_epochs} > "
            f"{config.budget.epochs}), or nothing is ever pruned",
        )


_RULES = (
    _check_names,
    _check_fixed,
    _check_conditions,
    _check_points,
    _check_metrics,
    _check_sampler,
    _check_pruner,
)
_RULES_OF_NEW = (_check_test_split, _check_continuous, _check_steps)
