"""Optuna's samplers from their block in a search file: a literal table.

A suggestion is a function of the trials before it and the new trial's number. Two of Optuna's
samplers write something that decides into the study while they sample, and would suggest something
else where a kill fell between that and the rest: they are mended here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from topotune.config.models import SearchConfig
from topotune.search.study.space import has_conditions
from topotune.seeding import derive_seed


def _seed(config: SearchConfig, number: int) -> int:
    return derive_seed(config.seed, number, replica=1) % 2**32


def _tpe(config: SearchConfig, number: int) -> BaseSampler:
    return optuna.samplers.TPESampler(
        n_startup_trials=config.sampler.startup_trials,
        group=has_conditions(config.space),
        seed=_seed(config, number),
    )


def _gp(config: SearchConfig, number: int) -> BaseSampler:
    return optuna.samplers.GPSampler(
        n_startup_trials=config.sampler.startup_trials,
        seed=_seed(config, number),
        warn_independent_sampling=False,
    )


def _cmaes(config: SearchConfig, number: int) -> BaseSampler:
    return optuna.samplers.CmaEsSampler(
        n_startup_trials=config.sampler.startup_trials,
        seed=_seed(config, number),
        consider_pruned_trials=config.pruner.name != "none",
        with_margin=True,
        warn_independent_sampling=False,
    )


class QMCSampler(optuna.samplers.QMCSampler):
    """As Optuna's; a trial's place in the sequence follows from its number.

    Optuna counts the places in the study, one further at every attempt to sample.

    Args:
        config: the search.
        number: the trial's.
    """

    def __init__(self, config: SearchConfig, number: int) -> None:
        super().__init__(
            scramble=True,
            # One scramble for the whole search: points of differently scrambled sequences are not
            # low-discrepancy together.
            seed=derive_seed(config.seed, -1) % 2**32,
            warn_asynchronous_seeding=False,
            warn_independent_sampling=False,
        )
        self._number = number

    def _find_sample_id(self, study: Study, search_space: dict[str, BaseDistribution]) -> int:
        return max(self._number - 1, 0)  # the first trial is not of the sequence


class NSGAIISampler(optuna.samplers.NSGAIISampler):
    """As Optuna's; its parents are always in the order of their numbers.

    Optuna keeps them in the study when the first child of a generation is sampled, in another
    order than that child had them. The class's name is that of Optuna's, since that of its
    attributes in the study follows from it.
    """

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        """The trials that the children of a generation descend from."""
        parents: list[FrozenTrial] = super().select_parent(study, generation)
        return sorted(parents, key=lambda trial: trial.number)


_SAMPLERS: dict[str, Callable[[SearchConfig, int], BaseSampler]] = {
    "tpe": _tpe,
    "gp": _gp,
    "cmaes": _cmaes,
    "qmc": QMCSampler,
    "nsga2": lambda config, number: NSGAIISampler(seed=_seed(config, number)),
    "random": lambda config, number: RandomSampler(seed=_seed(config, number)),
    # The grid's points are enqueued one by one; nothing is left to sample.
    "grid": lambda config, number: RandomSampler(seed=_seed(config, number)),
}


def make_sampler(config: SearchConfig, number: int) -> BaseSampler:
    """A fresh sampler for one ask, seeded by the search's seed and the trial's number.

    A suggestion is then a function of the study's content and the number alone: a search that was
    killed and resumed proposes what the undisturbed one would have.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _SAMPLERS[config.sampler.name](config, number)
