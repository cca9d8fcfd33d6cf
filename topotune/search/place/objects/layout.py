"""Which files of a search there are, and who writes each of them."""

from __future__ import annotations

import re

from topotune.search.place.output import ERROR_FILE, OUTPUT_FILE
from topotune.search.ray.watchdog import GUARD_FILE
from topotune.tracking.progress import PROGRESS_FILE
from topotune.train.checkpoint import CHECKPOINT_FILE
from topotune.train.trace import (
    RELAXATION_FILE,
    RELAXATION_FOLDER,
    TRACE_FILE,
    TRACE_FOLDER,
)

DRIVER_CLAIM = "driver.claim"
WORKER_CLAIM = "worker.claim"

_SAFE = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_NAME = re.compile(rf"(?:{_SAFE}/){{0,9}}{_SAFE}")
_TRIAL = re.compile(r"trials/([0-9]{4,7})/(.+)")
_CRASHED = re.compile(r"crash-[0-9]+\.txt")
_STAYS = ("driver.lock", DRIVER_CLAIM)
_UNFINISHED = (".partial", ".tmp")
_WORKERS = (CHECKPOINT_FILE, ERROR_FILE, GUARD_FILE, OUTPUT_FILE)
_CHUNKS = (f"{TRACE_FOLDER}/", f"{RELAXATION_FOLDER}/")


def belongs(name: str) -> bool:
    """Whether a name is one that a search can have, in a store or in a folder that others wrote."""
    return bool(_NAME.fullmatch(name)) and ".." not in name


def of_driver(name: str) -> bool:
    """Whether the driver writes a file to the store.

    Args:
        name: relative to the search's folder, with ``/``.
    """
    if (trial := split_trial(name)) is not None:
        return trial[1] in (TRACE_FILE, RELAXATION_FILE) or bool(_CRASHED.fullmatch(trial[1]))
    if name.startswith("study."):
        return name == "study.jsonl"  # of one in PostgreSQL, which can be built again from it
    stays = name in _STAYS or name.endswith(_UNFINISHED) or name.startswith("trials/")
    return belongs(name) and not stays


def of_worker(name: str) -> bool:
    """Whether a trial's worker writes a file to the store.

    Args:
        name: relative to the trial's folder, with ``/``.
    """
    return name in _WORKERS or (is_chunk(name) and not name.endswith(_UNFINISHED))


def is_chunk(name: str) -> bool:
    """Whether a worker's file is a trace that the driver joins with others when the trial ends."""
    return belongs(name) and name.startswith(_CHUNKS)


def for_driver(name: str) -> bool:
    """Whether the driver reads a worker's file as it comes: a checkpoint and what was printed are
    large and not for it, and a crash note is asked for when a worker has died.

    Args:
        name: relative to the trial's folder.
    """
    return of_worker(name) and name not in (CHECKPOINT_FILE, GUARD_FILE, OUTPUT_FILE)


def rank(name: str) -> int:
    """In which order files go to the store: what an epoch's checkpoint relies on, then the
    checkpoint; the outbox, then what says how much of it was sent."""
    return int(name.rpartition("/")[2] in (CHECKPOINT_FILE, PROGRESS_FILE))


def split_trial(name: str) -> tuple[int, str] | None:
    """A trial's number and the name within its folder; None of what is no trial's."""
    trial = _TRIAL.fullmatch(name)
    return (int(trial[1]), trial[2]) if trial else None


def trial_name(number: int) -> str:
    """A trial's folder, relative to the search's."""
    return f"trials/{number:04d}"
