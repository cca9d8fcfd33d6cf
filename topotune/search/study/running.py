"""What a study has of the trials that run, kept in memory as they are written.

Optuna reads a running trial anew for every look at it, half a dozen queries each, several times a
trial. Only the driver that holds the search's lease writes its trials, so that what it has written
is what is there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState


class RunningTrials:
    """Running trials by their id in the database; others are read there each time."""

    def __init__(self) -> None:
        self._trials: dict[int, FrozenTrial] = {}

    def get(self, trial_id: int, read: Callable[[], FrozenTrial]) -> FrozenTrial:
        """A trial, which the caller may change without changing this one.

        Args:
            trial_id: its id.
            read: reads it from the database.
        """
        trial = self._trials.get(trial_id)
        if trial is None:
            trial = read()
            if trial.state != TrialState.RUNNING:
                return trial
            self._trials[trial_id] = trial
        return _copied(trial)

    def change(
        self, trial_id: int, write: Callable[[], object], apply: Callable[[FrozenTrial], None]
    ) -> None:
        """Change a trial in the database, and then here.

        What raises in between leaves nothing here: the next look reads what was written.
        """
        trial = self._trials.pop(trial_id, None)
        write()
        if trial is not None:
            apply(trial)
            self._trials[trial_id] = trial

    def begin_anew(self, trial_id: int, trial: FrozenTrial) -> None:
        """Take a trial for one for which nothing has been sampled yet; what it has in the database
        is set again."""
        anew = _copied(trial)
        anew.params, anew.distributions = {}, {}
        anew.system_attrs = {k: v for k, v in anew.system_attrs.items() if k == "fixed_params"}
        self._trials[trial_id] = anew

    def forget(self, trial_id: int) -> None:
        """Read the trial from the database next time: its state changes."""
        self._trials.pop(trial_id, None)


def param_set(
    name: str, internal: float, distribution: BaseDistribution
) -> Callable[[FrozenTrial], None]:
    """Apply what ``set_trial_param`` does."""

    def apply(trial: FrozenTrial) -> None:
        trial.params = {**trial.params, name: distribution.to_external_repr(internal)}
        trial.distributions = {**trial.distributions, name: distribution}

    return apply


def value_set(step: int, value: float) -> Callable[[FrozenTrial], None]:
    """Apply what ``set_trial_intermediate_value`` does."""
    return lambda trial: trial.intermediate_values.update({step: value})


def attribute_set(kind: str, key: str, value: Any) -> Callable[[FrozenTrial], None]:
    """Apply what ``set_trial_user_attr`` and ``set_trial_system_attr`` do: the value is stored as
    JSON, and read as that says it."""
    stored = json.loads(json.dumps(value))
    return lambda trial: getattr(trial, kind).update({key: stored})


def _copied(trial: FrozenTrial) -> FrozenTrial:
    copied = copy.copy(trial)
    copied.params = dict(trial.params)
    copied.distributions = dict(trial.distributions)
    copied.user_attrs = dict(trial.user_attrs)
    copied.system_attrs = dict(trial.system_attrs)
    copied.intermediate_values = dict(trial.intermediate_values)
    return copied
