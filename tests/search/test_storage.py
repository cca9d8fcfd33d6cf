"""The study's database: what it is asked, and that running trials are what it says of them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from tests.search_cases import Desk, make_config
from topotune.errors import ResourceError
from topotune.search.study.patience import Patience
from topotune.search.study.storage import PatientStorage, open_storage

PARAMS: tuple[tuple[str, float, BaseDistribution], ...] = (
    ("lr", 3e-4, FloatDistribution(1e-4, 1e-1, log=True)),
    ("width", 17.0, IntDistribution(16, 256)),
    ("coupling", 1.0, CategoricalDistribution(["uniform", "exchange"])),
)


@pytest.fixture
def storage(tmp_path: Path) -> PatientStorage:
    desk = Desk(tmp_path, make_config())
    return open_storage(desk.folder, desk.config, Patience("here", limit=0.0))


def begun(storage: PatientStorage) -> int:
    study = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "other")
    return storage.create_new_trial(study)


def stored(storage: PatientStorage, trial: int) -> FrozenTrial:
    """The trial as the database has it, past all that is remembered."""
    found: FrozenTrial = storage.inner._backend.get_trial(trial)  # type: ignore[attr-defined]
    return found


def test_a_running_trial_is_what_the_database_has_after_every_change(
    storage: PatientStorage,
) -> None:
    trial = begun(storage)
    assert storage.get_trial(trial) == stored(storage, trial)
    for param in PARAMS:
        storage.set_trial_param(trial, *param)
        assert storage.get_trial(trial) == stored(storage, trial)
    for step, value in ((1, 0.1), (2, math.inf), (2, 0.3)):
        storage.set_trial_intermediate_value(trial, step, value)
        assert storage.get_trial(trial) == stored(storage, trial)
    values: list[Any] = [{"betas": (0.9, 0.99), 3: None}, [1.5], "text", None]
    for value in values:
        storage.set_trial_user_attr(trial, "spec", value)
        storage.set_trial_system_attr(trial, "constraint", value)
        assert storage.get_trial(trial) == stored(storage, trial)
    storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.3])
    ended = storage.get_trial(trial)
    assert ended == stored(storage, trial)
    assert ended.state == TrialState.COMPLETE
    assert ended.datetime_complete is not None


def test_who_changes_a_trial_that_was_read_changes_nothing_else(storage: PatientStorage) -> None:
    trial = begun(storage)
    storage.set_trial_param(trial, *PARAMS[0])
    read = storage.get_trial(trial)
    read.user_attrs["mine"] = read.system_attrs["mine"] = 1
    read.params["lr"] = 0.5
    read.intermediate_values[9] = 0.5
    assert storage.get_trial(trial) == stored(storage, trial)


def test_a_change_that_fails_is_not_remembered(
    storage: PatientStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = begun(storage)
    storage.get_trial(trial)

    def lost(*_: object, **__: object) -> None:
        raise optuna.exceptions.StorageInternalError("the answer was lost")

    backend = storage.inner._backend  # type: ignore[attr-defined]
    with monkeypatch.context() as broken:
        broken.setattr(backend, "set_trial_user_attr", lost)
        with pytest.raises(ResourceError):
            storage.set_trial_user_attr(trial, "end", {"outcome": "COMPLETE"})
    backend.set_trial_user_attr(trial, "end", "as another life of it wrote")
    assert storage.get_trial(trial) == stored(storage, trial)


def test_a_trial_is_read_when_it_begins_and_when_it_has_ended_and_not_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    whole = optuna.storages.RDBStorage.get_trial

    def counted(self: optuna.storages.RDBStorage, trial_id: int) -> FrozenTrial:
        reads.append(trial_id)
        return whole(self, trial_id)

    monkeypatch.setattr(optuna.storages.RDBStorage, "get_trial", counted)
    desk = Desk(tmp_path, make_config(budget={"trials": 5, "epochs": 3}))
    desk.run()
    # Once as it begins; as it has ended by Optuna's tell() and by the copy in its folder.
    assert Counter(reads) == dict.fromkeys(range(1, 6), 3)


def test_a_storage_that_lives_until_python_ends_says_nothing(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from tests.search_cases import Desk, make_config
desk = Desk(Path(sys.argv[1]), make_config())
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
