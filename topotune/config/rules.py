"""What a search file must not say, and what it may say and probably does not mean.

The rules here involve more than one block, or stop only a new search. Each yields every place that
breaks it, so that all faults of a file are seen at once; :mod:`topotune.config.file` calls them on
a file whose blocks are legal one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from topotune.config.models import SearchConfig
from topotune.config.space import (
    PARAM_NAME,
    Param,
    active_part,
    describe,
    grid_size,
    holds,
    last_value,
    plain,
    quoted,
    same,
    sampling_order,
    too_many_steps,
)
from topotune.errors import FieldError, did_you_mean
from topotune.records import Value
from topotune.redaction import address_with_secret, names_secret

MAX_GRID = 100_000
RESERVED_NAMES = ("address", "mlflow")
"""Paths of a results folder that belong to no search: an object store's mark, MLflow's store."""
Place: TypeAlias = tuple[str | int, ...]
Broken: TypeAlias = tuple[Place, str]
"""The path of a key, and the rule that it breaks, in words."""


def broken_rules(config: SearchConfig, *, saved: bool = False) -> list[Broken]:
    """Every place that breaks a rule, and the rule.

    Args:
        config: the search.
        saved: it exists: what only a new search is refused for does not stop it.
    """
    rules = _RULES if saved else (*_RULES, *_RULES_OF_NEW)
    return [broken for rule in rules for broken in rule(config)]


def planned_trials(config: SearchConfig) -> int | None:
    """How many trials a search starts at most; None where only time limits it."""
    limit = config.budget.trials
    if config.sampler.name != "grid":
        return limit
    points = grid_size(config.space)
    return points if limit is None else min(points, limit)


def metric_places(config: SearchConfig) -> list[tuple[Place, str]]:
    """The metrics that a search file names, and where it does."""
    several = len(config.objective) > 1
    places: list[tuple[Place, str]] = [
        (("objective", *([index] if several else []), "metric"), objective.metric)
        for index, objective in enumerate(config.objective)
    ]
    return places + [(("constraints", name), name) for name in config.constraints]


def _check_fixed(config: SearchConfig) -> Iterator[Broken]:
    for name in config.fixed:
        if name in config.space and not config.space[name].when:
            yield (("fixed", name), f"{name} stands in fixed and in space; remove one of them")


def _check_metrics(config: SearchConfig) -> Iterator[Broken]:
    metrics = [objective.metric for objective in config.objective]
    for index, metric in enumerate(metrics):
        if metric in metrics[:index]:
            yield (("objective",), f"metric {metric!r} stands twice")
    for name, bound in config.constraints.items():
        if bound.min is not None and bound.max is not None and bound.min > bound.max:
            yield (("constraints", name), f"min must not be above max ({bound.min} > {bound.max})")
        if name.startswith("overhead_") and config.overhead.blocks == 0:
            yield (
                ("constraints", name),
                "needs the overhead measurement, but overhead.blocks is 0",
            )


def _check_test_split(config: SearchConfig) -> Iterator[Broken]:
    for place, metric in metric_places(config):
        if metric.startswith("test_"):
            yield (
                place,
                f"{metric!r} is closed to a search: one that chose by the test split would fit it, "
                "and no data would be left to judge its winner by. Write "
                f"val_{metric.removeprefix('test_')}; 'topotune export' and 'topotune train' open "
                "the test split",
            )


def _check_names(config: SearchConfig) -> Iterator[Broken]:
    train_names = set(type(config.train).model_fields)
    for block, names in (("fixed", config.fixed), ("space", config.space)):
        for name in names:
            if not PARAM_NAME.fullmatch(name):
                yield (
                    (block, name),
                    f"parameter name {name!r} must be a name such as lr, or one with the prefix "
                    "model., task. or train., such as model.hidden",
                )
            scope, _, leaf = name.rpartition(".")
            if scope == "train" and leaf not in train_names:
                yield (
                    (block, name),
                    f"unknown train option {leaf!r}{did_you_mean(leaf, train_names)}",
                )


def _check_conditions(config: SearchConfig) -> Iterator[Broken]:
    space, known = config.space, True
    for name, param in space.items():
        for parent, wanted in param.when.items():
            place = ("space", name, "when", parent)
            if parent not in space:
                yield (
                    place,
                    f"condition on unknown parameter {parent!r}"
                    + did_you_mean(parent, (other for other in space if other != name)),
                )
                known = False
                continue
            for value in wanted if isinstance(wanted, list) else [wanted]:
                if not holds(space[parent], value):
                    yield (
                        place,
                        f"{parent} never takes the value {quoted(value)}"
                        + _quotes(space[parent], value),
                    )
    if known:
        try:
            sampling_order(space)
        except FieldError as error:
            yield error.path, error.problem


def _check_continuous(config: SearchConfig) -> Iterator[Broken]:
    for name, param in config.space.items():
        for parent, wanted in param.when.items():
            on = config.space.get(parent)
            if on is not None and on.type == "float" and on.step is None:
                yield (
                    ("space", name, "when", parent),
                    f"{parent} is continuous ({describe(on)}) and as good as never takes one exact "
                    f"value, so that {name} would never be searched; give {parent} a step, or "
                    "choices (type: categorical)",
                )
            elif wanted == []:
                yield (("space", name, "when", parent), "an empty list never holds; name a value")


def _check_steps(config: SearchConfig) -> Iterator[Broken]:
    for name, param in config.space.items():
        if param.type == "categorical" or param.step is None:
            continue
        place, bounds = ("space", name, "step"), f"({param.low} to {param.high})"
        if too_many_steps(param):
            yield (
                place,
                f"step {param.step} is too small for the range {bounds}; leave it out for a range "
                "without steps",
            )
        elif last_value(param) <= param.low:
            yield (
                place,
                f"step {param.step} exceeds the range {bounds}, so that only {param.low} would be "
                f"tried; lower the step, or move {name} to fixed",
            )


def _quotes(param: Param, value: Value) -> str:
    """What to write where a choice is a text and a number or word without quotes stands."""
    if isinstance(value, str) or param.type != "categorical" or plain(value) not in param.choices:
        return ""
    return f"; put it in quotes: {plain(value)!r}"


def _check_points(config: SearchConfig) -> Iterator[Broken]:
    space = config.space
    for index, point in enumerate(config.warm_start):
        for name, value in point.items():
            place = ("warm_start", index, name)
            if name not in space:
                yield (place, f"unknown parameter {name!r}{did_you_mean(name, space)}")
            elif not holds(space[name], value):
                yield (
                    place,
                    f"{quoted(value)} is outside {name}'s range ({describe(space[name])})"
                    + _quotes(space[name], value),
                )


def _check_sampler(config: SearchConfig) -> Iterator[Broken]:
    sampler, space = config.sampler.name, config.space
    if sampler == "grid":
        if config.warm_start:
            yield (("warm_start",), "a grid visits its points anyway; leave this out")
        for name, param in space.items():
            if param.when:
                yield (("space", name, "when"), "the grid sampler takes no conditions")
            if param.type == "float" and param.step is None:
                yield (("space", name), "the grid sampler needs a step for a float parameter")
            if param.type == "int" and param.log:
                yield (("space", name), "the grid sampler takes no log scale; list choices instead")
        countable = all(
            param.type == "categorical" or (param.step is not None and not too_many_steps(param))
            for param in space.values()
        )
        if countable and grid_size(space) > MAX_GRID:
            yield (("space",), f"the grid has more than {MAX_GRID} points; raise a step")
    if sampler == "cmaes":
        if len(config.objective) > 1:
            yield (("sampler",), "cmaes takes one objective; use tpe or nsga2 for several")
        if config.constraints:
            yield (("sampler",), "cmaes takes no constraints; use tpe, gp or nsga2")


def _check_pruner(config: SearchConfig) -> Iterator[Broken]:
    if len(config.objective) > 1 and config.pruner.name != "none":
        yield (
            ("pruner",),
            f"pruning compares one number, and there are {len(config.objective)} objectives; "
            "write pruner: none",
        )
    if config.pruner.name != "none" and config.pruner.min_epochs > config.budget.epochs:
        yield (
            ("pruner", "min_epochs"),
            f"must not be above budget.epochs ({config.pruner.min_epochs} > "
            f"{config.budget.epochs}), or nothing is ever pruned",
        )


def _check_reserved(config: SearchConfig) -> Iterator[Broken]:
    # In any case of its letters: on some file systems both are one path.
    if config.name.lower() in RESERVED_NAMES:
        yield (
            ("name",),
            f"{config.name!r} is what topotune itself keeps in a results folder "
            f"({', '.join(RESERVED_NAMES)}); choose another name",
        )


def _check_secrets(config: SearchConfig) -> Iterator[Broken]:
    """A search file is kept, uploaded and shown; a saved one has its secret kept already."""
    # The study's address has a rule of its own, which allows a user's name.
    for place, value in _texts(config.model_dump(exclude={"study"}), ()):
        names = [key for key in place if isinstance(key, str)]
        # What is searched is no secret, whatever its name.
        named = place[0] in ("task", "model", "fixed") and names_secret(names[-1])
        if value and (named or address_with_secret(value)):
            yield (
                place,
                "looks like a secret, and a search file is kept, uploaded and shown. Put it into "
                "the environment: MLFLOW_TRACKING_URI or MLFLOW_TRACKING_PASSWORD for the "
                "tracking server; a task of your own can read others from there",
            )


def _texts(value: object, place: Place) -> Iterator[tuple[Place, str]]:
    """Every text in nested plain data, and where it stands."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, (*place, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*place, index))


_RULES = (
    _check_names,
    _check_fixed,
    _check_conditions,
    _check_points,
    _check_metrics,
    _check_sampler,
    _check_pruner,
)
_RULES_OF_NEW = (
    _check_test_split,
    _check_continuous,
    _check_steps,
    _check_reserved,
    _check_secrets,
)


def remarks(config: SearchConfig) -> list[str]:
    """All that is odd about a search and allowed, a line each."""
    return [
        *_repeated_points(config),
        *_idle_gpus(config),
        *_small_grid(config),
        *unreached_ends(config),
    ]


def _repeated_points(config: SearchConfig) -> Iterator[str]:
    """A repeat may be meant, for its other seed; mostly it is a slip."""
    points = [active_part(config.space, point) for point in config.warm_start]
    for later, point in enumerate(points):
        for earlier, other in enumerate(points[:later]):
            if point.keys() == other.keys() and all(same(point[k], other[k]) for k in point):
                yield (
                    f"warm_start[{later}] is the same point as warm_start[{earlier}]: it is "
                    "trained twice, with different seeds. Remove one if that is not meant"
                )
                break


def _idle_gpus(config: SearchConfig) -> Iterator[str]:
    gpus = config.resources.gpus
    if gpus != "auto" and gpus > 1:
        yield (
            f"resources.gpus: each trial holds {gpus:g} GPUs and the training loop uses the first "
            "alone; the others stand idle unless code of your own uses them. Write gpus: 1"
        )


def _small_grid(config: SearchConfig) -> Iterator[str]:
    trials = config.budget.trials
    if config.sampler.name != "grid" or trials is None:
        return
    points = grid_size(config.space)
    if points < trials:
        yield f"budget.trials: the grid has {points} points, so that the search ends after {points}"
    elif points > trials:
        yield (
            f"budget.trials: {trials} of the grid's {points} points are tried, chosen by the seed; "
            "'topotune extend' adds others"
        )


def unreached_ends(config: SearchConfig) -> Iterator[str]:
    """A line for each parameter whose steps do not end at its ``high``."""
    for name, param in config.space.items():
        if param.type != "categorical" and last_value(param) != param.high:
            yield (
                f"space.{name}: steps of {param.step:g} from {param.low:g} do not reach high "
                f"{param.high:g}; the last value is {last_value(param):g}"
            )
