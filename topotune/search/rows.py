"""Read a study: its database, and its trials as the rows that the rest of the house reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from topotune.config import SearchConfig
from topotune.errors import SearchFolderError
from topotune.records import Outcome, TrialSummary, unpack_metrics
from topotune.search.folder import SearchFolder

FINISHED = "finished"
"""The constraint that a diverged or failed trial violates."""


def open_storage(folder: SearchFolder) -> RDBStorage:
    """The study's database; a lock held by another process is waited for.

    It keeps a write-ahead log: readers never hold up the driver, a killed process loses nothing,
    and a commit costs half of what the default journal costs.
    """
    storage = RDBStorage(folder.study_url, engine_kwargs={"connect_args": {"timeout": 60}})
    event.listen(storage.engine, "connect", _use_write_ahead_log)
    storage.engine.dispose()  # connections from before the listener
    return storage


def _use_write_ahead_log(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def damaged(folder: SearchFolder, error: Exception) -> SearchFolderError:
    """The error of a study that cannot be read."""
    text = " ".join(str(error.__cause__ or error).split())[:200]
    return SearchFolderError(f"{folder.root / 'study.db'}: the study cannot be read: {text}")


def summaries(
    folder: SearchFolder, config: SearchConfig, ledger: Mapping[int, float]
) -> list[TrialSummary]:
    """All trials of a search, read from its study; empty before the first start.

    Raises:
        SearchFolderError: the database is unreadable.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not (folder.root / "study.db").exists():
        trials_folder = folder.root / "trials"
        if trials_folder.is_dir() and any(trials_folder.iterdir()):
            raise SearchFolderError(
                f"{folder.root / 'study.db'}: is missing, though trials have run. Bring it back "
                "from a copy; leaderboard.json holds the last known results"
            )
        return []
    try:
        study = optuna.load_study(study_name=config.name, storage=open_storage(folder))
        trials = study.get_trials(deepcopy=False)
    except KeyError:
        return []
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise damaged(folder, error) from None
    return [summarise(trial, config, ledger) for trial in trials]


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
        _breach(name, metrics.get(name, math.nan), config)
        for name, excess in trial.constraints.items()
        if excess > 0 and name != FINISHED and outcome == Outcome.COMPLETE.value
    )
    spec = trial.user_attrs.get("spec", {})
    return TrialSummary(
        number=trial.number,
        state=outcome,
        reason=end.get("reason", ""),
        params=dict(trial.params),
        values=values,
        metrics=metrics,
        curve=dict(trial.intermediate_values),
        epochs=end.get("epochs", max(trial.intermediate_values, default=0)),
        seed=spec.get("seed", 0),
        device_seconds=end.get("device_seconds", ledger.get(trial.number, 0.0)),
        violated=violated,
        spec=spec,
    )


def _breach(name: str, value: float, config: SearchConfig) -> str:
    bound = config.constraints.get(name)
    if bound is None:
        return name
    if bound.max is not None and value > bound.max:
        return f"{name}: {value:.4g} > {bound.max:g}"
    if math.isnan(value):
        return f"{name}: not measured"
    return f"{name}: {value:.4g} < {bound.min:g}"
