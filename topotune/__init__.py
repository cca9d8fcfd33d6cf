"""topotune: distributed hyperparameter search for physics-inspired training.

This module re-exports the public names lazily: importing it loads neither torch nor ray nor
mlflow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from topotune.errors import TopotuneError
    from topotune.optim import TopologicalAdam
    from topotune.records import EpochReport, Outcome, TrialResult, TrialSpec
    from topotune.tasks import Task
    from topotune.train.trial import run_trial

__version__ = "0.2.0"

_HOMES = {
    "EpochReport": "topotune.records",
    "Outcome": "topotune.records",
    "Task": "topotune.tasks",
    "TopologicalAdam": "topotune.optim",
    "TopotuneError": "topotune.errors",
    "TrialResult": "topotune.records",
    "TrialSpec": "topotune.records",
    "run_trial": "topotune.train.trial",
}

__all__ = [
    "EpochReport",
    "Outcome",
    "Task",
    "TopologicalAdam",
    "TopotuneError",
    "TrialResult",
    "TrialSpec",
    "__version__",
    "run_trial",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'topotune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
