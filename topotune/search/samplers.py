"""Optuna's samplers and pruners from their blocks in a search file: two literal tables."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from topotune.config import PrunerConfig, SearchConfig
from topotune.search.space import has_conditions
from topotune.seeding import derive_seed


def _tpe(config: SearchConfig, seed: int) -> BaseSampler:
    return optuna.samplers.TPESampler(
        n_startup_trials=config.sampler.startup_trials,
        group=has_conditions(config.space),
        seed=seed,
    )


def _gp(config: SearchConfig, seed: int) -> BaseSampler:
    return optuna.samplers.GPSampler(
        n_startup_trials=config.sampler.startup_trials,
        seed=seed,
        warn_independent_sampling=False,
    )


def _cmaes(config: SearchConfig, seed: int) -> BaseSampler:
    return optuna.samplers.CmaEsSampler(
        n_startup_trials=config.sampler.startup_trials,
        seed=seed,
        consider_pruned_trials=config.pruner.name != "none",
        with_margin=True,
        warn_independent_sampling=False,
    )


def _qmc(config: SearchConfig, seed: int) -> BaseSampler:
    # One scramble for the whole search: points of differently scrambled sequences are not
    # low-discrepancy together.
    del seed
    return optuna.samplers.QMCSampler(
        scramble=True,
        seed=derive_seed(config.seed, -1) % 2**32,
        warn_asynchronous_seeding=False,
        warn_independent_sampling=False,
    )


_SAMPLERS: dict[str, Callable[[SearchConfig, int], BaseSampler]] = {
    "tpe": _tpe,
    "gp": _gp,
    "cmaes": _cmaes,
    "qmc": _qmc,
    "nsga2": lambda config, seed: optuna.samplers.NSGAIISampler(seed=seed),
    "random": lambda config, seed: optuna.samplers.RandomSampler(seed=seed),
    # The grid's points are enqueued one by one; nothing is left to sample.
    "grid": lambda config, seed: optuna.samplers.RandomSampler(seed=seed),
}


def make_sampler(config: SearchConfig, number: int) -> BaseSampler:
    """A fresh sampler for one ask, seeded by the search's seed and the trial's number.

    A suggestion is then a function of the study's content and the number alone: a search that was
    killed and resumed proposes what the undisturbed one would have.
    """
    seed = derive_seed(config.seed, number, replica=1) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _SAMPLERS[config.sampler.name](config, seed)


def _asha(pruner: PrunerConfig, epochs: int) -> BasePruner:
    del epochs
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=pruner.min_epochs, reduction_factor=pruner.reduction_factor
    )


def _hyperband(pruner: PrunerConfig, epochs: int) -> BasePruner:
    return optuna.pruners.HyperbandPruner(
        min_resource=pruner.min_epochs,
        max_resource=epochs,
        reduction_factor=pruner.reduction_factor,
    )


def _median(pruner: PrunerConfig, epochs: int) -> BasePruner:
    del epochs
    return optuna.pruners.MedianPruner(
        n_startup_trials=pruner.startup_trials, n_warmup_steps=pruner.min_epochs
    )


_PRUNERS: dict[str, Callable[[PrunerConfig, int], BasePruner]] = {
    "asha": _asha,
    "hyperband": _hyperband,
    "median": _median,
    "none": lambda pruner, epochs: optuna.pruners.NopPruner(),
}


def make_pruner(config: SearchConfig) -> BasePruner:
    """The pruner; its state is the study's intermediate values, so a restart loses nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _PRUNERS[config.pruner.name](config.pruner, config.budget.epochs)
