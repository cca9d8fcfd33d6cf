"""From a search file to Optuna: suggestions in order, the grid, and the resolved TrialSpec."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

from optuna.trial import Trial

from topotune.config.models import SearchConfig
from topotune.config.space import (
    CategoricalParam,
    FloatParam,
    IntParam,
    Param,
    active_part,
    grid_axis,
    is_active,
    last_value,
    sampling_order,
)
from topotune.records import OverheadOptions, TrainOptions, TrialSpec, Value
from topotune.seeding import derive_seed


def suggest(trial: Trial, space: Mapping[str, Param]) -> dict[str, Value]:
    """Values of the active parameters, each after those that its condition reads."""
    chosen: dict[str, Value] = {}
    for name in sampling_order(space):
        if is_active(space[name], chosen):
            chosen[name] = _suggest_one(trial, name, space[name])
    return {name: chosen[name] for name in space if name in chosen}


def _suggest_one(trial: Trial, name: str, param: Param) -> Value:
    # Optuna would cut the range down to its last step itself, with a warning for every trial.
    if isinstance(param, FloatParam):
        high = last_value(param)
        return trial.suggest_float(name, param.low, high, log=param.log, step=param.step)
    if isinstance(param, IntParam):
        high = last_value(param)
        return trial.suggest_int(name, param.low, int(high), log=param.log, step=param.step)
    choice: Value = trial.suggest_categorical(name, param.choices)
    return choice


def has_conditions(space: Mapping[str, Param]) -> bool:
    """Whether any parameter is conditional."""
    return any(param.when for param in space.values())


def grid(config: SearchConfig) -> list[dict[str, Value]]:
    """Every point of the grid, in an order shuffled by the search's seed."""
    axes = {name: _axis(param) for name, param in config.space.items()}
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    random.Random(config.seed).shuffle(points)
    return points


def queued_points(config: SearchConfig) -> list[dict[str, Value]]:
    """The points that come before the sampler's: point N is trial N's."""
    if config.sampler.name == "grid":
        return grid(config)[: config.budget.trials]
    return [dict(point) for point in config.warm_start]


def _axis(param: Param) -> list[Value]:
    if isinstance(param, CategoricalParam):
        return list(param.choices)
    step = param.step
    assert step is not None  # the config refuses a grid over a float without one
    return [min(param.low + index * step, param.high) for index in range(grid_axis(param))]


def resolve(
    config: SearchConfig, sampled: Mapping[str, Value], number: int, gpus: float
) -> TrialSpec:
    """The complete training run of one trial: fixed values, then what was sampled over them.

    Args:
        config: the search.
        sampled: parameter name to value, names as in the file.
        number: the trial's number, which its seed is derived from.
        gpus: GPUs that the trial holds; 0 trains on the CPU.
    """
    scopes: dict[str, dict[str, Any]] = {"": {}, "model": {}, "task": {}, "train": {}}
    for name, value in {**config.fixed, **sampled}.items():
        scope, _, leaf = name.rpartition(".")
        scopes[scope][leaf] = value
    return TrialSpec(
        task=config.task.name,
        method=config.method,
        epochs=config.budget.epochs,
        seed=derive_seed(config.seed, number),
        params=scopes[""],
        task_options={**config.task.options, **scopes["task"]},
        model=config.model.name,
        model_options={**config.model.options, **scopes["model"]},
        train=TrainOptions(**{**config.train.model_dump(), **scopes["train"]}),
        overhead=OverheadOptions(**config.overhead.model_dump()),
        split_seed=config.task.split_seed,
        data_dir=config.task.data_dir,
        download=config.task.download,
        # A GPU that the cluster only declares does not count for torch: see topotune.train.devices.
        device="auto" if gpus > 0 else "cpu",
        threads=config.resources.cpus,
    )


def corners(config: SearchConfig, gpus: float = 0) -> list[TrialSpec]:
    """Specs at the low and the high end of every range and at every choice: what a check builds.

    Not every combination: each parameter is moved alone, the others stay at a middle value, so
    the number of specs grows linearly with the space.
    """
    middle = {name: _ends(param)[0] for name, param in config.space.items()}
    points: list[dict[str, Value]] = [middle]
    for name, param in config.space.items():
        points += [{**middle, name: end} for end in _ends(param)]
    points += [dict(point) for point in config.warm_start]
    seen: list[dict[str, Value]] = []
    for point in points:
        active = active_part(config.space, point)
        if active not in seen:
            seen.append(active)
    return [resolve(config, point, 0, gpus) for point in seen]


def _ends(param: Param) -> list[Value]:
    if isinstance(param, CategoricalParam):
        return list(param.choices)
    return [param.low, last_value(param)]
