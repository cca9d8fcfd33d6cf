"""Read a study: its database, and its trials as the rows that the rest of the house reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from topotune.config.models import SearchConfig
from topotune.errors import SearchFolderError
from topotune.records import Outcome, TrialSummary, unpack_metrics
from topotune.results.text import spread
from topotune.search.place.folder import SearchFolder
from topotune.search.study.address import study_name
from topotune.search.study.notes import damaged_record, reported
from topotune.search.study.storage import open_storage

FINISHED = "finished"
"""The constraint that a diverged or failed trial violates."""


def summaries(
    folder: SearchFolder, config: SearchConfig, ledger: Mapping[int, float]
) -> list[TrialSummary]:
    """All trials of a search, read from its study; empty before the first start.

    Raises:
        ResourceError: the database cannot be reached.
        SearchFolderError: it is damaged or missing.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials: list[FrozenTrial] = []
    if config.study.uri is not None or (folder.root / "study.db").exists():
        storage = open_storage(folder, config)
        try:
            found = storage.get_study_id_from_name(study_name(folder, config))
            trials = storage.get_all_trials(found, deepcopy=False)
        except KeyError:
            pass  # no study yet, or no more
        finally:
            storage.close()
    if not trials and next((folder.root / "trials").glob("*/*"), None):
        raise SearchFolderError(
            f"{folder.root}: the study is empty or missing, though trials have run. "
            f"'topotune resume {folder.name}' rebuilds it from the trials' own records"
        )
    return [_checked(folder, trial, config, ledger) for trial in trials]


def _checked(
    folder: SearchFolder, trial: FrozenTrial, config: SearchConfig, ledger: Mapping[int, float]
) -> TrialSummary:
    """A trial of a study that others may have written."""
    try:
        row = summarise(trial, config, ledger)
        for value, kind in (
            *((row.state, str), (row.reason, str), (row.epochs, int), (row.seed, int)),
            *((row.device_seconds, int | float), (row.spec, dict)),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{value!r:.80} is no {kind}")
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise damaged_record(str(folder.root), trial.number, error) from None
    return row


def summarise(
    trial: FrozenTrial, config: SearchConfig, ledger: Mapping[int, float]
) -> TrialSummary:
    """A study's trial as the record that the rest of the house reads."""
    end: dict[str, Any] = trial.user_attrs.get("end", {})
    finished = trial.state.is_finished()
    metrics = unpack_metrics(end.get("metrics", {}))
    outcome = end.get("outcome", Outcome.FAILED.value) if finished else trial.state.name
    values: tuple[float, ...] = ()
    if outcome == Outcome.COMPLETE.value and trial.values:
        values = tuple(trial.values)
    violated = tuple(
        _breach(name, metrics, config)
        for name, excess in trial.constraints.items()
        if excess > 0 and name != FINISHED and outcome == Outcome.COMPLETE.value
    )
    spec = trial.user_attrs.get("spec", {})
    epochs = reported(trial, len(config.objective))
    curve, *further = [
        {epoch: value for epoch, values in epochs.items() if (value := values[i]) is not None}
        for i in range(len(config.objective))
    ]
    return TrialSummary(
        number=trial.number,
        state=outcome,
        reason=end.get("reason", ""),
        params=dict(trial.params),
        values=values,
        metrics=metrics,
        curve=curve,
        further_curves=tuple(further),
        epochs=end.get("epochs", max(epochs, default=0)),
        seed=spec.get("seed", 0),
        device_seconds=end.get("device_seconds", ledger.get(trial.number, 0.0)),
        violated=violated,
        spec=spec,
    )


def _breach(name: str, metrics: Mapping[str, float], config: SearchConfig) -> str:
    bound, value = config.constraints.get(name), metrics.get(name, math.nan)
    if bound is None:
        return name
    shown = f"{name}: {value:.4g}{spread(metrics, name)}"
    if bound.max is not None and value > bound.max:
        return f"{shown} > {bound.max:g}"
    if math.isnan(value):
        return f"{name}: not measured"
    return f"{shown} < {bound.min:g}"
