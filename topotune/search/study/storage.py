"""Where a study is kept: in the journal of its search's folder, or in PostgreSQL.

A study in PostgreSQL has a journal, too, as its copy: each change is made in the database first and
then appended, and all that the driver reads comes from the copy. So a database that was set back is
noticed, and one that lost the study gets it back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from topotune.config.models import SearchConfig
from topotune.errors import SearchFolderError, TopotuneError
from topotune.redaction import brief
from topotune.search.place.addresses import study_place
from topotune.search.place.folder import STUDY_COPY, STUDY_FILE, SearchFolder
from topotune.search.study.address import study_name
from topotune.search.study.database import PatientStorage, open_database
from topotune.search.study.journal import Journal, JournalReader
from topotune.search.study.patience import Patience


def open_study(
    folder: SearchFolder, config: SearchConfig, patience: Patience, fence: Callable[[], None]
) -> tuple[BaseStorage, Journal]:
    """A search's study for its driver, and the journal that each turn is committed to.

    Args:
        folder: the search's folder.
        config: the search.
        patience: how to wait for a database; its ``note`` gets a line on all that is mended.
        fence: called before each write; raises if another driver has taken the search over.

    Raises:
        ResourceError: the database cannot be reached or used, or the folder not be written.
        SearchFolderError: the study is damaged, or has lost trials.
    """
    name, path = study_name(folder, config), folder.root / STUDY_FILE
    if config.study.uri is None:
        journal = Journal((path, folder.root / STUDY_COPY), patience.note, fence)
        storage = _opened(journal, path)
        _refuse_if_later(folder, str(path), len(_trials(storage, name) or ()))
        return storage, journal
    database = open_database(folder, config, patience)
    try:
        study = _whole(folder, config, database)
        journal = Journal((path,), patience.note, fence, anew=True)
        replicated = ReplicatedStorage(database, JournalStorage(journal), fence)
        replicated.take_over(study)
        journal.commit()
    except BaseException:
        database.close()
        raise
    return replicated, journal


@contextmanager
def reading(folder: SearchFolder, config: SearchConfig) -> Iterator[BaseStorage]:
    """A search's study inside of a ``with`` block, which cannot be changed through it.

    Raises:
        ResourceError: it cannot be reached.
        SearchFolderError: it is damaged.
    """
    if config.study.uri is None:
        paths = folder.root / STUDY_FILE, folder.root / STUDY_COPY
        yield _opened(JournalReader(paths), paths[0])
        return
    database = open_database(folder, config)
    try:
        database.refuse_writes()
        yield database
    finally:
        database.close()


def _opened(backend: BaseJournalBackend, path: Path) -> JournalStorage:
    try:
        return JournalStorage(backend)
    except TopotuneError:
        raise
    except Exception as error:
        # Intact lines that no Optuna wrote: it trusts its own, and may stumble in any way.
        raise SearchFolderError(
            f"{path}: the study cannot be read: {type(error).__name__}: {brief(str(error), 200)}. "
            "Bring it back from a backup"
        ) from error


def _trials(storage: BaseStorage, name: str) -> list[FrozenTrial] | None:
    """A study's trials; None where there is no such study."""
    try:
        return storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False)
    except KeyError:
        return None


def _refuse_if_later(folder: SearchFolder, place: str, count: int) -> None:
    """The trials that come next must not meet the files of others that had their numbers."""
    homes = {path.parent for path in (folder.root / "trials").glob("*/*")}
    later = sorted(h for h in homes if h.name.isdecimal() and int(h.name) >= count)
    if later:
        raise SearchFolderError(
            f"{place}: the study knows of {count} trials, though trial {later[-1].name} has run. "
            "Bring it back from a backup; leaderboard.json holds the last known results. To go on "
            f"without these trials, move {later[0]} and those after it away"
        )


def _whole(folder: SearchFolder, config: SearchConfig, database: PatientStorage) -> int:
    """The id of a search's study in its database, where it is made if it is new, and made again
    from its copy if it is lost.

    Raises:
        SearchFolderError: it knows less than its copy does.
    """
    name, place, path = study_name(folder, config), study_place(folder, config), STUDY_FILE
    known: list[FrozenTrial] = []
    try:
        replica = _opened(JournalReader((folder.root / path,)), folder.root / path)
        known = _trials(replica, name) or []
    except SearchFolderError as error:
        database.patience.note(f"warning: {error}. It is written again from the database")
    stored = _trials(database, name)
    if stored is not None:
        if _behind(stored, known):
            raise SearchFolderError(
                f"{place}: the study {name!r} knows less than its copy {path} does. Bring the "
                "database's newer state back, or delete that study there: 'topotune resume' then "
                "builds it again from the copy"
            )
        return int(database.get_study_id_from_name(name))
    _refuse_if_later(folder, place, len(known))
    directions = [StudyDirection[objective.direction.upper()] for objective in config.objective]
    study: int = database.create_new_study(directions, name)
    if known:
        database.patience.note(
            f"warning: the database has no study {name!r} any more; built again from the "
            f"{len(known)} trials of {path}"
        )
        _copy_study(replica, replica.get_study_id_from_name(name), database, study)
    return study


def _copy_study(there: BaseStorage, study: int, here: BaseStorage, own: int) -> None:
    for key, value in there.get_study_system_attrs(study).items():
        here.set_study_system_attr(own, key, value)
    for trial in there.get_all_trials(study, deepcopy=False):
        here.create_new_trial(own, trial)


def _rank(trial: FrozenTrial) -> int:
    """How far a trial has come: queued, running, running with its spec, ended."""
    if trial.state.is_finished():
        return 4
    if trial.state == TrialState.WAITING:
        return 1
    return 3 if "spec" in trial.user_attrs else 2


def _behind(stored: Sequence[FrozenTrial], known: Sequence[FrozenTrial]) -> bool:
    pairs = zip(stored, known, strict=False)
    return len(stored) < len(known) or any(_rank(one) < _rank(copy) for one, copy in pairs)


def _write(name: str, ids: str) -> Callable[..., Any]:
    def method(self: ReplicatedStorage, own: int, *args: Any, **kwargs: Any) -> Any:
        self._fence()
        getattr(self._database, name)(getattr(self, ids)[own], *args, **kwargs)
        return getattr(self._copy, name)(own, *args, **kwargs)

    method.__name__, method.__doc__ = name, "As Optuna's, in the database first."
    return method


def _read(name: str) -> Callable[..., Any]:
    def method(self: ReplicatedStorage, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._copy, name)(*args, **kwargs)

    method.__name__, method.__doc__ = name, "As Optuna's, from the copy."
    return method


class ReplicatedStorage(BaseStorage):
    """Makes each change in a database and then in a copy of it, which answers all that is read.

    Its ids are those of the copy.

    Args:
        database: the truth.
        copy: holds nothing yet.
        fence: called before each write; raises if another driver has taken the search over.
    """

    def __init__(
        self, database: PatientStorage, copy: JournalStorage, fence: Callable[[], None]
    ) -> None:
        self._database, self._copy, self._fence = database, copy, fence
        self._studies: dict[int, int] = {}  # the copy's ids to the database's
        self._trials: dict[int, int] = {}
        self._sampled: dict[tuple[int, str], float] = {}

    def take_over(self, study: int) -> None:
        """Have the copy say what the database does of a study.

        Of a trial that was being sampled when its driver died nothing is taken over that was
        sampled: samplers skip what a trial has already, and would draw the rest differently.
        """
        name = self._database.get_study_name_from_id(study)
        own = self._copy.create_new_study(self._database.get_study_directions(study), name)
        self._studies[own] = study
        for key, value in self._database.get_study_system_attrs(study).items():
            self._copy.set_study_system_attr(own, key, value)
        for trial in self._database.get_all_trials(study, deepcopy=False):
            sampled = {}
            if _rank(trial) == 2:
                for name, kind in trial.distributions.items():
                    sampled[name] = kind.to_internal_repr(trial.params[name])
                fixed = {k: v for k, v in trial.system_attrs.items() if k == "fixed_params"}
                trial = copy.copy(trial)
                trial.params, trial.distributions, trial.system_attrs = {}, {}, fixed
            made = self._copy.create_new_trial(own, trial)
            self._trials[made] = trial._trial_id
            self._sampled |= {(made, name): value for name, value in sampled.items()}

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """As Optuna's, in the database first."""
        self._fence()
        made = self._database.create_new_study(directions, study_name)
        own = self._copy.create_new_study(directions, self._database.get_study_name_from_id(made))
        self._studies[own] = made
        return own

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """As Optuna's, in the database first."""
        self._fence()
        made = self._database.create_new_trial(self._studies[study_id], template_trial)
        own = self._copy.create_new_trial(study_id, template_trial)
        self._trials[own] = made
        return own

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """As Optuna's, in the database first; what that has of a parameter stays."""
        value = self._sampled.pop((trial_id, param_name), param_value_internal)
        self._set_trial_param(trial_id, param_name, value, distribution)

    _set_trial_param = _write("set_trial_param", "_trials")
    delete_study = _write("delete_study", "_studies")
    set_study_user_attr = _write("set_study_user_attr", "_studies")
    set_study_system_attr = _write("set_study_system_attr", "_studies")
    set_trial_state_values = _write("set_trial_state_values", "_trials")
    set_trial_intermediate_value = _write("set_trial_intermediate_value", "_trials")
    set_trial_user_attr = _write("set_trial_user_attr", "_trials")
    set_trial_system_attr = _write("set_trial_system_attr", "_trials")
    get_study_id_from_name = _read("get_study_id_from_name")
    get_study_name_from_id = _read("get_study_name_from_id")
    get_study_directions = _read("get_study_directions")
    get_study_user_attrs = _read("get_study_user_attrs")
    get_study_system_attrs = _read("get_study_system_attrs")
    get_all_studies = _read("get_all_studies")
    get_trial_id_from_study_id_trial_number = _read("get_trial_id_from_study_id_trial_number")
    get_trial = _read("get_trial")
    get_all_trials = _read("get_all_trials")

    def remove_session(self) -> None:
        """Give the database's connections back."""
        self._database.close()
