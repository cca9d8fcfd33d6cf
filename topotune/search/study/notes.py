"""The notes that a trial carries in the study: what it was told, how it ended, how often it died.

They are plain JSON in a database and in files that others may have written, so they are checked
before anything is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

from topotune.errors import SearchFolderError
from topotune.records import Outcome, unpack_metrics

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


def check_notes(trial: FrozenTrial, objectives: int | None = None) -> None:
    """Make sure that a trial's notes have the form that the house gives them.

    Args:
        trial: from a study or a record that others may have written.
        objectives: how many values an ended trial has, if that is known.

    Raises:
        ValueError: they do not, or they contradict the trial's state; the text says where.
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
        if objectives is not None:
            reported(trial, objectives)
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(str(error)) from None
    if objectives is not None and trial.values is not None and len(trial.values) != objectives:
        raise ValueError(f"{len(trial.values)} values where the search has {objectives} objectives")


def check_stored(trial: FrozenTrial, place: str, objectives: int) -> None:
    """As :func:`check_notes`, of a study's trial.

    Raises:
        SearchFolderError: it is damaged.
    """
    try:
        check_notes(trial, objectives)
    except ValueError as error:
        raise damaged_record(place, trial.number, error) from None


def damaged_record(place: str, number: int, error: Exception) -> SearchFolderError:
    """The error for a study, at a place, that others have written or something has damaged."""
    return SearchFolderError(
        f"{place}: the study's record of trial {number} is damaged ({error}). Bring the study "
        "back from a copy, or move it away: 'topotune resume' then rebuilds it from the trials' "
        "own records"
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
