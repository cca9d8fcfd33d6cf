"""Verdicts: those of Optuna's own pruners on the same reports, and what they cost."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any, Literal

import optuna
import pytest
from optuna.pruners import BasePruner
from optuna.trial import Trial, TrialState

from tests.search_cases import make_config
from topotune.config.models import SearchConfig
from topotune.search.study.pruner import Hyperband, make_pruner

SEED = 3


def _config(name: str, direction: str, epochs: int, **options: Any) -> SearchConfig:
    return make_config(
        pruner={"name": name, **options},
        objective={"metric": "val_accuracy", "direction": direction},
        budget={"trials": 10**6, "epochs": epochs},
        seed=SEED,
    )


def _optunas(config: SearchConfig) -> BasePruner:
    pruner, epochs = config.pruner, config.budget.epochs
    first, factor = pruner.min_epochs, pruner.reduction_factor
    made: dict[str, Callable[[], BasePruner]] = {
        "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(first, factor),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(first, epochs, factor),
        "median": lambda: optuna.pruners.MedianPruner(pruner.startup_trials, first),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return made[pruner.name]()


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("asha", {"reduction_factor": 2}),
        ("asha", {"reduction_factor": 3, "min_epochs": 2}),
        ("asha", {"reduction_factor": 4}),
        ("hyperband", {"reduction_factor": 2}),
        ("hyperband", {"reduction_factor": 3, "min_epochs": 2}),
        ("median", {"startup_trials": 1, "min_epochs": 3}),
        ("median", {"startup_trials": 4}),
    ],
)
def test_verdicts_are_those_of_optunas_pruners(
    name: str, options: dict[str, Any], direction: Literal["maximize", "minimize"]
) -> None:
    epochs, chance = 13, random.Random(f"{name}{options}")
    config = _config(name, direction, epochs, **options)
    ours = make_pruner(config)
    # Optuna takes a bracket from the study's name, where ours has the search's seed.
    study = optuna.create_study(
        study_name=str(SEED), directions=[direction], pruner=_optunas(config)
    )
    live: dict[int, Trial] = {}
    curves: dict[int, dict[int, float]] = {}
    verdicts: list[bool] = []
    while len(curves) < 120 or live:
        while len(live) < 5 and len(curves) < 120:
            trial = study.ask()
            live[trial.number], curves[trial.number] = trial, {}
        number = chance.choice(sorted(live))
        trial, curve = live[number], curves[number]
        epoch = len(curve) + 1
        value = round(chance.gauss(0, 1), 1)  # ties, too
        trial.report(value, epoch)
        stops = ours.stops(number, curve, epoch, value) if epoch < epochs else False
        if epoch < epochs:
            verdicts.append(stops)
            assert stops == trial.should_prune(), (number, epoch)
        ours.reported(number, epoch - 1, epoch, value)
        curve[epoch] = value
        # A trial that fails is COMPLETE to Optuna, as the study stores it.
        over = stops or epoch == epochs or chance.random() < 0.02
        if over:
            state = TrialState.PRUNED if stops else TrialState.COMPLETE
            study.tell(live.pop(number), None if stops else value, state=state)
            if not stops:
                ours.completed(curve)
    assert 10 <= sum(verdicts) <= len(verdicts) - 10


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_a_pruner_is_built_again_from_the_curves_whatever_their_order(name: str) -> None:
    chance = random.Random(0)
    config = _config(name, "maximize", 9, startup_trials=1)
    curves = {
        number: {epoch: chance.random() for epoch in range(1, chance.randint(1, 9) + 1)}
        for number in range(40)
    }
    pruners = []
    for order in (list(curves), sorted(curves, reverse=True)):
        pruner = make_pruner(config)
        for number in order:
            known: dict[int, float] = {}
            for epoch, value in curves[number].items():
                pruner.reported(number, epoch - 1, epoch, value)
                known[epoch] = value
            if len(known) == 9:
                pruner.completed(known)
        pruners.append(pruner)
    answers = [
        [
            pruner.stops(number, dict.fromkeys(range(1, epoch), 0.5), epoch, value / 20)
            for number in range(40, 60)
            for epoch in (1, 2, 3, 8)
            for value in range(20)
        ]
        for pruner in pruners
    ]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 2


def test_an_early_trial_that_went_on_alone_is_not_judged_by_later_ones() -> None:
    pruner = make_pruner(_config("asha", "maximize", 9))
    assert not pruner.stops(0, {}, 1, 0.1)
    pruner.reported(0, 0, 1, 0.1)
    for number in range(1, 10):
        assert not pruner.stops(number, {}, 1, 0.5)
        pruner.reported(number, 0, 1, 0.5)
    assert pruner.stops(10, {}, 1, 0.1)  # what it would be now
    assert not pruner.stops(0, {1: 0.1}, 2, 0.1)


def test_a_bracket_follows_from_the_seed_and_the_number_alone() -> None:
    def brackets(**changes: Any) -> list[int]:
        config = make_config(
            **{"pruner": "hyperband", "budget": {"trials": 9, "epochs": 27}, **changes}
        )
        pruner = make_pruner(config)
        assert isinstance(pruner, Hyperband)
        return [pruner._brackets.index(pruner._bracket(number)) for number in range(200)]

    assert brackets() == brackets(name="another")
    assert brackets() != brackets(seed=1)
    counts = [brackets().count(rate) for rate in range(4)]
    assert sum(counts) == 200
    assert counts == sorted(counts, reverse=True)
