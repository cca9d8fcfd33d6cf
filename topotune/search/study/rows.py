"""What a study holds of a trial: the notes that it carries, and the row that the rest of the house
reads.

The notes are plain JSON that others may have written, so they are checked before anything is made
of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial

from topotune.config.models import SearchConfig
from topotune.errors import SearchFolderError
from topotune.records import Outcome, TrialSummary, unpack_metrics
from topotune.results.text import spread
from topotune.search.place.addresses import study_place
from topotune.search.place.folder import SearchFolder
from topotune.search.study.address import study_name
from topotune.search.study.storage import reading

FINISHED = "finished"
"""The constraint that a diverged or failed trial violates."""
SPENT = "topotune:spent"
"""The study's note of the wall time, and of the device seconds of trials that had not ended."""
_SPEC = {"task": str, "method": str, "epochs": int, "seed": int}
_END = {
    "outcome": str,
    "reason": str,
    "metrics": dict,
    "epochs": int,
    "device_seconds": int | float,
}


JUDGED = "judged"
"""Of the note of an end: the first objective's value that the pruner stopped the trial at, which
the kill of a driver may have kept from its curve."""

_REPORT = "topotune:epoch:"


def note_of(epoch: int) -> str:
    """The name of the note that holds an epoch's objectives, where there are several.

    Optuna keeps one curve a trial, and of one objective: its samplers fail on curves of several.
    """
    return f"{_REPORT}{epoch}"


def reported(trial: FrozenTrial, objectives: int) -> dict[int, list[float | None]]:
    """What a trial reported of its objectives, by epoch; None where an epoch has no value.

    Raises:
        ValueError: a note has another form.
        TypeError: the same.
    """
    if objectives == 1:
        return {epoch: [value] for epoch, value in trial.intermediate_values.items()}
    found: dict[int, list[float | None]] = {}
    for name, note in trial.system_attrs.items():
        if name.startswith(_REPORT):
            values = [None if value is None else float(value) for value in note]
            if len(values) != objectives:
                raise ValueError(f"{name}: {len(values)} values of {objectives} objectives")
            found[int(name.removeprefix(_REPORT))] = values
    return dict(sorted(found.items()))


class Spent(NamedTuple):
    """What a search has taken: seconds of wall time, and each trial's device seconds."""

    wall_seconds: float
    trials: dict[int, float]


def spent(trials: list[FrozenTrial], note: Mapping[str, Any] | None) -> Spent:
    """What a study says was spent.

    Args:
        trials: all of its trials; those that ended say it themselves.
        note: the study's note of the others; None for none.

    Raises:
        ValueError: the note has another form.
    """
    seconds: dict[int, float] = {}
    try:
        note = {"wall_seconds": 0.0, "trials": {}} if note is None else note
        wall = float(note["wall_seconds"])
        seconds = {int(number): float(value) for number, value in note["trials"].items()}
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{SPENT}: {error}") from None
    for trial in trials:
        if (end := trial.user_attrs.get("end")) is not None:
            ended = float(end["device_seconds"])
            seconds[trial.number] = max(seconds.get(trial.number, 0.0), ended)
    return Spent(wall, seconds)


def read_study(folder: SearchFolder, config: SearchConfig) -> tuple[list[TrialSummary], Spent]:
    """All trials of a search and what they took; nothing before the first start.

    Raises:
        ResourceError: the study cannot be reached.
        SearchFolderError: it is damaged or missing.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    run = next((folder.root / "trials").glob("*/*"), None)  # first: a driver may be about to begin
    trials: list[FrozenTrial] = []
    note = None
    with reading(folder, config) as storage:
        try:
            study = storage.get_study_id_from_name(study_name(folder, config))
            note = storage.get_study_system_attrs(study).get(SPENT)
            trials = storage.get_all_trials(study, deepcopy=False)
        except KeyError:
            pass  # no study yet, or no more
    if run and not trials:
        raise SearchFolderError(
            f"{study_place(folder, config)}: the study is empty or missing, though trials have "
            f"run. See what 'topotune resume {folder.name}' says"
        )
    for trial in trials:
        check_notes(trial, str(folder.root), len(config.objective))
    try:
        taken = spent(trials, note)
    except ValueError as error:
        raise damaged_study(str(folder.root), "note of its time", error) from None
    return [summarise(trial, config, taken.trials) for trial in trials], taken


def summaries(folder: SearchFolder, config: SearchConfig) -> list[TrialSummary]:
    """All trials of a search, as :func:`read_study`."""
    return read_study(folder, config)[0]


def check_notes(trial: FrozenTrial, place: str, objectives: int) -> None:
    """Make sure that a trial's notes have the form that the house gives them.

    Args:
        trial: from a study that others may have written.
        place: of the study.
        objectives: how many values an ended trial has.

    Raises:
        SearchFolderError: they do not, or they contradict the trial's state; the text says where.
    """
    notes = trial.user_attrs
    try:
        if "spec" in notes:
            _check("spec", notes["spec"], _SPEC)
        if "deaths" in notes:
            _check("deaths", notes["deaths"], dict.fromkeys(notes["deaths"], int))
        if "end" in notes:
            _check_end(notes["end"], trial)
        for name, excess in trial.constraints.items():
            if not isinstance(excess, int | float):
                raise TypeError(f"constraint {name}: expected a number, got {excess!r:.80}")
        _check("fixed_params", trial.system_attrs.get("fixed_params", {}), {})
        reported(trial, objectives)
        for value in (*(trial.values or ()), *trial.intermediate_values.values()):
            if not isinstance(value, int | float):
                raise TypeError(f"expected a number, got {value!r:.80}")
            float(value)
        if trial.values is not None and len(trial.values) != objectives:
            raise ValueError(
                f"{len(trial.values)} values where the search has {objectives} objectives"
            )
    except (TypeError, KeyError, AttributeError, OverflowError, ValueError) as error:
        raise damaged_record(place, trial.number, error) from None


def damaged_record(place: str, number: int, error: Exception) -> SearchFolderError:
    """The error for a study, at a place, that others have written or something has damaged."""
    return damaged_study(place, f"record of trial {number}", error)


def damaged_study(place: str, part: str, error: Exception) -> SearchFolderError:
    """The same of any part of it."""
    return SearchFolderError(
        f"{place}: the study's {part} is damaged ({error}). Bring the study back from a backup"
    )


def _check(name: str, note: Any, parts: Mapping[str, Any]) -> None:
    if not isinstance(note, dict):
        raise TypeError(f"{name}: expected an object, got {note!r:.80}")
    for part, kind in parts.items():
        if not isinstance(note.get(part), kind):
            raise TypeError(f"{name}.{part}: expected {kind}, got {note.get(part)!r:.80}")


def _check_end(end: Any, trial: FrozenTrial) -> None:
    _check("end", end, _END)
    unpack_metrics(end["metrics"])
    if not math.isfinite(end.get(JUDGED, 0.0)):
        raise ValueError(f"end.{JUDGED}: expected a finite number, got {end[JUDGED]!r}")
    if not math.isfinite(end["device_seconds"]) or end["device_seconds"] < 0:
        raise ValueError(f"end.device_seconds: expected seconds, got {end['device_seconds']!r}")
    complete = Outcome(end["outcome"]) is Outcome.COMPLETE
    if complete and trial.state.is_finished() and trial.values is None:
        raise ValueError("end.outcome: COMPLETE, and the trial has no values")


def constraint_values(
    config: SearchConfig, metrics: Mapping[str, float], outcome: Outcome
) -> dict[str, float]:
    """Constraint values as Optuna wants them: the same keys every time, feasible at <= 0.

    A value that is missing or NaN is a violation, but for a pruned trial, which may not have
    come to measure it. One more, FINISHED, tells the samplers which trials came to an end at all.
    """
    found = {}
    unknown = 0.0 if outcome is Outcome.PRUNED else 1.0
    for name, bound in config.constraints.items():
        value = metrics.get(name, math.nan)
        excess = [value - bound.max] if bound.max is not None else []
        excess += [bound.min - value] if bound.min is not None else []
        found[name] = unknown if math.isnan(value) else max(-1e300, min(max(excess), 1e300))
    # A Gaussian process would fit one more model a constraint; the worst value tells it enough.
    if config.sampler.name != "gp":
        fine = outcome in (Outcome.COMPLETE, Outcome.PRUNED)
        found[FINISHED] = -1.0 if fine else 1.0
    return found


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
