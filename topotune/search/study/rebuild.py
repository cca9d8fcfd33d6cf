"""A study that was damaged, lost or set back, built again from the trials' own records."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from topotune.config.models import SearchConfig
from topotune.errors import ResourceError, SearchFolderError
from topotune.files import make_folder
from topotune.search.place.folder import SearchFolder
from topotune.search.study.address import study_name
from topotune.search.study.patience import Patience, explained
from topotune.search.study.space import queued_points
from topotune.search.study.storage import PatientStorage, open_storage
from topotune.search.study.trialfile import TrialCopy, read_copies, write_copy

LOST_FOLDER = "trials.lost"
"""Where the folders of trials go whose records are lost."""


def whole_storage(folder: SearchFolder, config: SearchConfig, patience: Patience) -> PatientStorage:
    """The search's storage, its study rebuilt first where that is needed.

    A study file that fails its check, is missing, or knows less than the trials' records do is
    moved aside and built again from the records; said in a note. Where it knows more, the records
    are brought up to date.

    Raises:
        ResourceError: the database cannot be used, or the folder not be written.
        SearchFolderError: a PostgreSQL study knows less than the records do, or trials have run
            of which neither a study nor a record tells.
    """
    copies = read_copies(folder.root, len(config.objective))
    in_file = config.study.uri is None
    fault = _fault(folder, copies, patience) if in_file else ""
    stored: list[FrozenTrial] = []
    attributes: Mapping[str, Any] = {}
    if not fault:
        opened: PatientStorage | None = None
        try:
            opened = storage = open_storage(folder, config, patience)
            stored, attributes = _read(storage, study_name(folder, config))
        except SearchFolderError as error:  # passes its check, but holds other tables
            if opened is not None:
                opened.close()
            if not in_file:
                raise
            fault = str(error)
    if not stored and not copies:
        try:
            _refuse_if_run(folder, patience.place, fault or "knows no trial")
        except SearchFolderError:
            if not fault:
                storage.close()
            raise
    if not fault:
        if not _behind(stored, copies):
            for trial in stored:
                if _rank(trial) > _rank(_trial(copies, trial.number)) and _begun(trial):
                    write_copy(folder, TrialCopy(trial, attributes))
            return storage
        fault = "knows less than the trials' own records do" if stored else "is empty or missing"
        storage.close()
    if in_file:
        aside = _move_aside(folder.root)
        patience.note(
            f"warning: study.db {fault}; {'moved to ' + aside.name + ', ' if aside else ''}"
            f"rebuilt from the records of {len(copies)} trials"
        )
    elif stored:
        raise SearchFolderError(
            f"{patience.place}: the study {study_name(folder, config)!r} {fault}. Bring the "
            "database's newer state back, or delete that study there: 'topotune resume' then "
            "rebuilds it from the records"
        )
    storage = open_storage(folder, config, patience)
    _build(storage, folder, config, stored, copies)
    return storage


def _fault(folder: SearchFolder, copies: Mapping[int, TrialCopy], patience: Patience) -> str:
    """What is wrong with a search's study file; empty where nothing is or none is needed yet."""
    path = folder.root / "study.db"
    if not path.exists():
        if not copies:
            _refuse_if_run(folder, str(path), "is missing")  # before an empty one is made
        return "is missing" if copies else ""

    def check() -> str:
        connection = sqlite3.connect(path, timeout=1)
        try:
            return str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
        finally:
            connection.close()

    try:
        found = patience(check)
    except SearchFolderError as error:
        return f"is damaged ({' '.join(str(error.__cause__).split())[:100]})"
    return "" if found == "ok" else f"is damaged ({' '.join(found.split())[:100]})"


def _refuse_if_run(folder: SearchFolder, place: str, fault: str) -> None:
    """A search that would begin again must not meet what its lost trials left."""
    if next((folder.root / "trials").glob("*/*"), None):
        raise SearchFolderError(
            f"{place}: {fault}, though trials have run, and they kept no records. Bring it back "
            "from a copy; leaderboard.json holds the last known results. To begin again, move "
            f"{folder.root / 'trials'} away"
        )


def _read(storage: PatientStorage, name: str) -> tuple[list[FrozenTrial], Mapping[str, Any]]:
    """A study's trials and its attributes; none where there is no such study."""
    try:
        found = storage.get_study_id_from_name(name)
    except KeyError:
        return [], {}
    try:
        trials = storage.get_all_trials(found, deepcopy=False)
        return trials, storage.get_study_system_attrs(found)
    except (ValueError, KeyError) as error:  # its rows contradict each other
        raise explained(sqlite3.DatabaseError(str(error)), storage.patience.place) from error


def _trial(copies: Mapping[int, TrialCopy], number: int) -> FrozenTrial | None:
    return copies[number].trial if number in copies else None


def _begun(trial: FrozenTrial) -> bool:
    return "spec" in trial.user_attrs


def _rank(trial: FrozenTrial | None) -> int:
    """How far a trial has come: unknown, queued, running, running with its spec, ended."""
    if trial is None:
        return 0
    if trial.state.is_finished():
        return 4
    if trial.state == TrialState.WAITING:
        return 1
    return 3 if _begun(trial) else 2


def _behind(stored: list[FrozenTrial], copies: Mapping[int, TrialCopy]) -> bool:
    ranks = {trial.number: _rank(trial) for trial in stored}
    return any(_rank(copy.trial) > ranks.get(number, 0) for number, copy in copies.items())


def _move_aside(root: Path) -> Path | None:
    """Give study.db and what belongs to it another name; the new name, None if there is none."""
    index = 1
    while (root / f"study.damaged-{index}.db").exists():
        index += 1
    moved = None
    for suffix in ("-shm", "-wal", ""):
        part = root / f"study.db{suffix}"
        if part.exists():
            moved = part.rename(root / f"study.damaged-{index}.db{suffix}")
    return moved


def _build(
    storage: PatientStorage,
    folder: SearchFolder,
    config: SearchConfig,
    stored: list[FrozenTrial],
    copies: Mapping[int, TrialCopy],
) -> None:
    study = optuna.create_study(
        storage=storage,
        study_name=study_name(folder, config),
        directions=[objective.direction for objective in config.objective],
        load_if_exists=True,
    )
    best: dict[int, FrozenTrial] = {trial.number: trial for trial in stored}
    for number, copy in copies.items():
        if _rank(copy.trial) >= _rank(best.get(number)):
            best[number] = copy.trial
    _set_aside(folder, {number for number, trial in best.items() if _begun(trial)}, storage)
    points = queued_points(config)
    for number in range(max(best, default=-1) + 1):
        if number not in best:
            # Its record is gone: it runs again, from its beginning; a queued point as it was.
            fixed = {"fixed_params": points[number]} if number < len(points) else {}
            best[number] = optuna.trial.create_trial(state=TrialState.RUNNING, system_attrs=fixed)
        try:
            study.add_trial(best[number])
        except (ValueError, TypeError) as error:
            raise SearchFolderError(
                f"{folder.trial(number)}: what is known of the trial contradicts itself "
                f"({' '.join(str(error).split())[:200]}). Move that folder out of the search, "
                "then resume: its number runs again"
            ) from error
    newest = copies[max(copies)].study if copies else {}
    for key, value in newest.items():
        storage.set_study_system_attr(study._study_id, key, value)


def _set_aside(folder: SearchFolder, known: set[int], storage: PatientStorage) -> None:
    """Move away the folders of trials of which neither the study nor a record knows anything.

    Such a number runs again, perhaps with other values: nothing of the two may be mixed.
    """
    trials, lost = folder.root / "trials", folder.root / LOST_FOLDER
    names = {folder.trial(number).name for number in known}
    for home in sorted(trials.glob("[0-9]*")):
        if home.name in names:
            continue
        index = 1
        while (aside := lost / f"{home.name}-{index}").exists():
            index += 1
        make_folder(lost)
        try:
            home.rename(aside)
        except OSError as error:
            raise ResourceError(f"{home}: cannot be moved to {aside}: {error.strerror}") from error
        storage.patience.note(
            f"warning: trial {home.name}: its record is lost, so its number runs again from its "
            f"beginning; its old folder is {LOST_FOLDER}/{aside.name}. MLflow keeps what it has "
            "of the old trial and refuses what contradicts it"
        )
