"""A trial as the study has it, kept a second time in the trial's own folder.

Written when a trial is handed out and when it has ended, as one checked line that replaces the
one before. From these files a study that was damaged or lost is built again, whole.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from topotune.errors import SpoolError
from topotune.files import make_folder
from topotune.records import pack_number, unpack_number
from topotune.search.place.folder import SearchFolder, write_bytes
from topotune.search.study.notes import check_notes
from topotune.tracking.lines import decode, encode

TRIAL_FILE = "trial.jsonl"
PREVIOUS_TRIAL_FILE = "trial.previous.jsonl"
MAX_TRIALS = 1_000_000
"""No search comes near: a larger number is no record of ours, and not made room for."""
_UNREADABLE = (
    *(OSError, SpoolError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError),
    RecursionError,
)
"""What a damaged record can raise while it is taken apart."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialCopy:
    """A trial of the study, and the study's own attributes (a sampler's place, say) by then."""

    trial: FrozenTrial
    study: Mapping[str, Any]

    def to_payload(self) -> dict[str, Any]:
        """Strict JSON."""
        trial = self.trial
        return {
            "number": trial.number,
            "state": trial.state.name,
            "values": None if trial.values is None else [pack_number(v) for v in trial.values],
            "params": {
                name: [distribution_to_json(trial.distributions[name]), value]
                for name, value in trial.params.items()
            },
            "curve": [[step, pack_number(v)] for step, v in trial.intermediate_values.items()],
            "user": trial.user_attrs,
            "system": trial.system_attrs,
            "start": _text(trial.datetime_start),
            "complete": _text(trial.datetime_complete),
            "study": dict(self.study),
        }

    @classmethod
    def from_payload(cls, data: Mapping[str, Any]) -> TrialCopy:
        """The inverse of :meth:`to_payload`.

        Raises:
            Exception: one of several kinds, of what others have written.
        """
        values = data["values"]
        distributions = {name: json_to_distribution(d) for name, (d, _) in data["params"].items()}
        trial = FrozenTrial(
            number=int(data["number"]),
            state=TrialState[data["state"]],
            value=None,
            values=None if values is None else [unpack_number(v) for v in values],
            datetime_start=_time(data["start"]),
            datetime_complete=_time(data["complete"]),
            params={name: value for name, (_, value) in data["params"].items()},
            distributions=distributions,
            user_attrs=dict(data["user"]),
            system_attrs=dict(data["system"]),
            intermediate_values={int(step): unpack_number(v) for step, v in data["curve"]},
            trial_id=-1,  # the database gives one
        )
        trial._validate()  # as the study will, which then takes it
        return cls(trial, dict(data["study"]))


def _text(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _time(text: str | None) -> datetime | None:
    time = None if text is None else datetime.fromisoformat(text)
    if time is not None and time.tzinfo is not None:
        raise ValueError(f"{text}: expected a time without a zone, as the study has it")
    return time


def write_copy(folder: SearchFolder, copy: TrialCopy) -> None:
    """Keep a trial's present state in its folder; the one before stays beside it.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    home = folder.trial(copy.trial.number)
    # Other studies' or generations' trial ids mean nothing in a database that is built anew.
    attributes = {k: v for k, v in copy.study.items() if not isinstance(v, list | dict)}
    line = encode(TrialCopy(copy.trial, attributes).to_payload())
    make_folder(home)
    write_bytes(home / TRIAL_FILE, line, keep=home / PREVIOUS_TRIAL_FILE)


def read_copies(root: Path, objectives: int | None = None) -> dict[int, TrialCopy]:
    """What the trials' folders hold of the study, by number; a damaged file is as none, and so
    is one of another trial or with a number that no search reaches.

    Args:
        root: the search's folder.
        objectives: how many values an ended trial has, if that is known.
    """
    found = {}
    for home in sorted((root / "trials").glob("[0-9]*")):
        for name in (TRIAL_FILE, PREVIOUS_TRIAL_FILE):
            copy = _read(home / name, objectives)
            if copy is None:
                continue
            number = copy.trial.number
            if number < MAX_TRIALS and home.name == f"{number:04d}":
                found[number] = copy
                break
            _log.warning("%s: is the record of trial %d; it is not used", home / name, number)
    return found


def _read(path: Path, objectives: int | None) -> TrialCopy | None:
    try:
        copy = TrialCopy.from_payload(decode(path.read_bytes().removesuffix(b"\n")))
        check_notes(copy.trial, objectives)
        return copy
    except FileNotFoundError:
        return None
    except _UNREADABLE as error:
        _log.warning("%s: damaged (%s); the one before is used", path, error)
        return None
