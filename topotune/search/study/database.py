"""A study in PostgreSQL: Optuna's storage, made patient."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext

from topotune.config.models import SearchConfig
from topotune.errors import ResourceError
from topotune.search.place.addresses import study_place, study_uri
from topotune.search.place.folder import SearchFolder
from topotune.search.study.address import with_driver
from topotune.search.study.patience import Patience, StudyAwayError, absence

READER_SECONDS = 10.0
"""How long ``status`` and its like wait for a database that is away."""
OPENING_SECONDS = 60.0
"""How long a new search waits for its study database."""
POSTGRESQL = {
    "connect_timeout": 5,
    "tcp_user_timeout": 20_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""Half-open connections of a host that vanished end after half a minute, not after hours: with a
query on its way by the time-out of what is not acknowledged, with one that is waited for by the
probes."""


def open_database(
    folder: SearchFolder, config: SearchConfig, patience: Patience | None = None
) -> PatientStorage:
    """A search's study database; close it after use.

    Raises:
        ResourceError: it cannot be reached or used, or another version of Optuna made it.
    """
    if patience is None:
        patience = Patience(study_place(folder, config), limit=READER_SECONDS)
    url = study_uri(config)
    assert url is not None
    # Optuna formats the address: braces in a password stand for themselves.
    address = with_driver(url).render_as_string(hide_password=False)
    address = address.replace("{", "{{").replace("}", "}}")
    options = {"connect_args": dict(POSTGRESQL)}
    try:
        backend = patience(lambda: _Database(address, engine_kwargs=options))
    except RuntimeError as error:  # all that Optuna says of a schema that it does not know
        raise ResourceError(
            f"study {patience.place}: {' '.join(str(error).split())} Use the Optuna it was made "
            f"with, or upgrade it; this is Optuna {optuna.__version__}"
        ) from error
    return PatientStorage(backend, patience)


def check_study(folder: SearchFolder, config: SearchConfig, note: Callable[[str], None]) -> None:
    """Reach a study database before anything of the search is written.

    Raises:
        ResourceError: it cannot be reached within ``OPENING_SECONDS``, or refuses.
        ConfigError: the package that speaks to it is not installed.
    """
    if config.study.uri is not None:
        patience = Patience(study_place(folder, config), note, OPENING_SECONDS)
        open_database(folder, config, patience).close()


class _Database(RDBStorage):
    """Optuna's, which gives its connections back when it is dropped, also half-way through its
    opening: Python 3.13 warns of connections that are left to the collector."""

    def __del__(self) -> None:
        # While Python ends, SQLAlchemy's own names may be gone already.
        if (engine := vars(self).get("engine")) and not sys.is_finalizing():
            engine.dispose()


def _only_reads(connection: Any, _record: object) -> None:
    connection.read_only = True  # of psycopg: said at the beginning of every transaction


def _at_once(context: ExceptionContext) -> None:
    """Past Optuna's own repeats, which are blind: they could make a trial twice."""
    if away := absence(context.original_exception, context.is_disconnect):
        raise StudyAwayError(away)


def _patient(name: str) -> Callable[..., Any]:
    def method(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return self.patience(lambda: getattr(self.inner, name)(*args, **kwargs))

    method.__name__, method.__doc__ = name, "As Optuna's, with patience."
    return method


class PatientStorage(BaseStorage):
    """A database whose every method is one transaction that waits for it.

    Args:
        backend: the database; Optuna's cache is put before it.
        patience: how to wait.
    """

    def __init__(self, backend: RDBStorage, patience: Patience) -> None:
        event.listen(backend.engine, "handle_error", _at_once)
        self._engine = backend.engine
        self.inner = optuna.storages.get_storage(backend)
        self.patience = patience
        self._newest: dict[int, int] = {}  # study to the highest id of a trial that is known

    create_new_study = _patient("create_new_study")
    delete_study = _patient("delete_study")
    set_study_user_attr = _patient("set_study_user_attr")
    set_study_system_attr = _patient("set_study_system_attr")
    get_study_id_from_name = _patient("get_study_id_from_name")
    get_study_name_from_id = _patient("get_study_name_from_id")
    get_study_directions = _patient("get_study_directions")
    get_study_user_attrs = _patient("get_study_user_attrs")
    get_study_system_attrs = _patient("get_study_system_attrs")
    get_all_studies = _patient("get_all_studies")
    get_trial_id_from_study_id_trial_number = _patient("get_trial_id_from_study_id_trial_number")
    get_trial = _patient("get_trial")
    get_all_trials = _patient("get_all_trials")
    set_trial_param = _patient("set_trial_param")
    set_trial_intermediate_value = _patient("set_trial_intermediate_value")
    set_trial_user_attr = _patient("set_trial_user_attr")
    set_trial_system_attr = _patient("set_trial_system_attr")
    remove_session = _patient("remove_session")

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """As Optuna's; a trial that was made though the answer was lost is not made twice."""
        if study_id not in self._newest:
            trials = self.get_all_trials(study_id, deepcopy=False)
            self._newest[study_id] = max((trial._trial_id for trial in trials), default=-1)

        def again() -> int:
            for trial in self.inner.get_all_trials(study_id, deepcopy=False):
                if trial._trial_id > self._newest[study_id]:
                    return trial._trial_id
            return make()

        def make() -> int:
            return self.inner.create_new_trial(study_id, template_trial)

        self._newest[study_id] = self.patience(make, again)
        return self._newest[study_id]

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        """As Optuna's; a state that was set though the answer was lost counts as set."""

        def again() -> bool:
            return self.inner.get_trial(trial_id).state == state or make()

        def make() -> bool:
            return self.inner.set_trial_state_values(trial_id, state, values)

        return self.patience(make, again)

    def refuse_writes(self) -> None:
        """From here on the database itself refuses whatever would change it."""
        event.listen(self._engine, "connect", _only_reads)
        self._engine.dispose()  # connections from before the listener

    def close(self) -> None:
        """Give the connections back."""
        self.inner.remove_session()
        self._engine.dispose()
