"""A study in PostgreSQL: what the database has, its copy in the folder says, and gives it back."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
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
from optuna.storages import JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

from tests.postgres import Postgres, installed
from tests.search_cases import Desk, make_config, report
from topotune.errors import LeaseLostError, ResourceError, SearchFolderError
from topotune.search.drive.book import Progress
from topotune.search.place.addresses import remembered
from topotune.search.place.folder import STUDY_COPY, STUDY_FILE
from topotune.search.study.address import study_name
from topotune.search.study.database import PatientStorage, open_database
from topotune.search.study.journal import Journal, JournalReader
from topotune.search.study.patience import Patience
from topotune.search.study.storage import ReplicatedStorage
from topotune.search.study.store import Handout, StudyStore
from topotune.settings import STUDY_URI

PARAMS: tuple[tuple[str, float, BaseDistribution], ...] = (
    ("lr", 3e-4, FloatDistribution(1e-4, 1e-1, log=True)),
    ("width", 17.0, IntDistribution(16, 256)),
    ("coupling", 1.0, CategoricalDistribution(["uniform", "exchange"])),
)


@pytest.fixture
def storage(desk: Desk, tmp_path: Path) -> Iterator[ReplicatedStorage]:
    database = open_database(desk.folder, desk.config, Patience("here", limit=0.0))
    copy = JournalStorage(Journal((tmp_path / "journal",), anew=True))
    yield ReplicatedStorage(database, copy, lambda: None)
    database.close()


def begun(storage: ReplicatedStorage, name: str) -> int:
    study = storage.create_new_study([StudyDirection.MAXIMIZE], name)
    return storage.create_new_trial(study)


def both(storage: ReplicatedStorage, trial: int) -> tuple[FrozenTrial, FrozenTrial]:
    """A trial as the copy has it and as the database does, but for its id and the clock."""
    stored = storage._database.inner._backend.get_trial(storage._trials[trial])  # type: ignore[attr-defined]
    read = storage.get_trial(trial)
    stored._trial_id = read._trial_id
    assert abs((stored.datetime_start - read.datetime_start).total_seconds()) < 5
    stored.datetime_start = read.datetime_start
    if read.datetime_complete is not None:
        stored.datetime_complete = read.datetime_complete
    return read, stored


def test_the_copy_is_what_the_database_has_after_every_change(storage: ReplicatedStorage) -> None:
    trial = begun(storage, "changes")

    def check() -> None:
        read, stored = both(storage, trial)
        assert read == stored

    check()
    for param in PARAMS:
        storage.set_trial_param(trial, *param)
        check()
    for step, value in ((1, 0.1), (2, math.inf), (2, 0.3)):
        storage.set_trial_intermediate_value(trial, step, value)
        check()
    values: list[Any] = [{"betas": (0.9, 0.99), 3: None}, [1.5], "text", None]
    for value in values:
        storage.set_trial_user_attr(trial, "spec", value)
        storage.set_trial_system_attr(trial, "constraint", value)
        check()
    storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.3])
    check()
    ended = storage.get_trial(trial)
    assert ended.state == TrialState.COMPLETE
    assert ended.datetime_complete is not None


def test_a_change_that_fails_is_not_in_the_copy(
    storage: ReplicatedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = begun(storage, "fails")

    def lost(*_: object, **__: object) -> None:
        raise optuna.exceptions.StorageInternalError("the answer was lost")

    backend = storage._database.inner._backend  # type: ignore[attr-defined]
    with monkeypatch.context() as broken:
        broken.setattr(backend, "set_trial_user_attr", lost)
        with pytest.raises(ResourceError):
            storage.set_trial_user_attr(trial, "end", {"outcome": "COMPLETE"})
    read, stored = both(storage, trial)
    assert read == stored
    assert read.user_attrs == {}


def test_a_driver_that_was_replaced_changes_nothing_in_the_database(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = handed(desk)
    before = desk.rows()

    def lost() -> None:
        raise LeaseLostError("another driver")

    monkeypatch.setattr(desk.store._storage, "_fence", lost)
    with pytest.raises(LeaseLostError):
        desk.book.progress(turn.number, Progress((report(turn.spec, 1),)))
    with pytest.raises(LeaseLostError):
        desk.store.next()
    assert desk.rows() == before


def handed(desk: Desk) -> Handout:
    turn = desk.book.next()
    assert isinstance(turn, Handout)
    return turn


def test_a_driver_reads_the_database_when_it_opens_it_and_never_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = [name for name in vars(PatientStorage) if name.startswith("get_")]
    assert len(reads) >= 9
    handed(desk)  # creating the first trial asks once which are there
    with monkeypatch.context() as blind:
        for name in reads:
            blind.delattr(PatientStorage, name)
        desk.book.concurrency = 2
        desk.run()
    assert len(desk.rows()) == 6


def test_the_copy_is_written_anew_from_the_database_at_every_opening(desk: Desk) -> None:
    for _ in range(3):
        desk.train(handed(desk))
    handed(desk)
    before = desk.rows()
    desk.store.close()
    path = desk.folder.root / STUDY_FILE
    assert not (desk.folder.root / STUDY_COPY).exists()
    kept = path.read_bytes()
    for content in (kept[:300], b"\xff" * 99, kept[:2000] + b"x" + kept[2001:], None):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        again = Desk(desk.folder.root.parent, desk.config)
        copied = JournalStorage(JournalReader((path,))).get_all_trials(0)
        stored = again.store._storage._database.get_all_trials(  # type: ignore[attr-defined]
            again.store._storage._studies[0]  # type: ignore[attr-defined]
        )
        for trial in stored:
            trial._trial_id = trial.number
        assert copied == stored
        assert again.rows() == before
        again.store.close()


def reopened(desk: Desk) -> tuple[StudyStore, list[str]]:
    notes: list[str] = []
    patience = Patience("here", notes.append)
    return StudyStore(desk.folder, desk.config, patience=patience), notes


def drop(desk: Desk) -> None:
    """Delete the study from the database."""
    database = open_database(desk.folder, desk.config)
    name = study_name(desk.folder, desk.config)
    database.delete_study(database.get_study_id_from_name(name))
    database.close()


def test_a_study_that_was_lost_is_built_again_trial_by_trial(desk: Desk) -> None:
    for _ in range(3):
        desk.train(handed(desk))
    turn = handed(desk)
    desk.book.progress(turn.number, Progress((report(turn.spec, 1),)))
    desk.ledger.wall_seconds = 7.5
    desk.ledger.save()
    before, trials = desk.rows(), desk.store._study.get_trials()
    desk.store.close()
    drop(desk)
    desk.folder.trial(0).mkdir(parents=True)
    (desk.folder.trial(0) / "spool.jsonl").touch()
    with pytest.raises(SearchFolderError, match="the study is empty or missing"):
        desk.rows()
    store, notes = reopened(desk)
    name = study_name(desk.folder, desk.config)
    assert notes == [
        f"warning: the database has no study {name!r} any more; built again from the 4 trials of "
        "study.jsonl"
    ]
    assert store._study.get_trials() == trials
    assert store.spent().wall_seconds == 7.5
    assert desk.rows() == before
    store.close()
    again, quiet = reopened(desk)
    assert quiet == []
    again.close()


def test_a_study_that_was_set_back_is_refused(desk: Desk, server: Postgres) -> None:
    for _ in range(2):
        desk.train(handed(desk))
    desk.store.close()
    kept = (desk.folder.root / STUDY_FILE).read_bytes()
    name = study_name(desk.folder, desk.config)
    database = open_database(desk.folder, desk.config)
    with database._engine.begin() as connection:
        connection.execute(
            text(
                "UPDATE trials SET state = 'RUNNING' WHERE number = 1 AND study_id = "
                "(SELECT study_id FROM studies WHERE study_name = :name)"
            ),
            {"name": name},
        )
    database.close()
    expected = r"the study 'demo-.*' knows less than its copy study\.jsonl does\. Bring the .*back"
    with pytest.raises(SearchFolderError, match=expected):
        reopened(desk)
    assert (desk.folder.root / STUDY_FILE).read_bytes() == kept
    drop(desk)  # as it says
    store, notes = reopened(desk)
    assert "built again from the 2 trials" in notes[0]
    store.close()


def test_a_study_that_was_lost_with_its_copy_is_not_begun_again(desk: Desk) -> None:
    desk.train(handed(desk))
    desk.store.close()
    home = desk.folder.trial(0)
    home.mkdir(parents=True, exist_ok=True)
    (home / "spool.jsonl").write_text("old")
    drop(desk)
    path = desk.folder.root / STUDY_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    for content in (b"", b"x" + b"".join(lines)):
        path.write_bytes(content)
        with pytest.raises(SearchFolderError, match=r"knows of 0 trials, though trial 0000 has"):
            reopened(desk)


def test_a_study_of_another_optuna_is_refused_with_the_fix_and_left_alone(tmp_path: Path) -> None:
    if not installed():
        pytest.skip("PostgreSQL's server (initdb, postgres) is not installed")
    with Postgres() as own, pytest.MonkeyPatch.context() as patch:
        patch.setenv(STUDY_URI, own.uri)
        desk = Desk(tmp_path, remembered(make_config()))
        desk.store.close()
        database = open_database(desk.folder, desk.config)
        with database._engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = 'v99'"))
        database.close()
        with pytest.raises(ResourceError, match=r"study here: .*Use the Optuna it was made with"):
            reopened(desk)


def test_a_storage_that_lives_until_python_ends_says_nothing(
    server: Postgres, tmp_path: Path
) -> None:
    code = """
import sys
from pathlib import Path
from tests.search_cases import Desk, make_config
from topotune.search.place.addresses import remembered
desk = Desk(Path(sys.argv[1]), remembered(make_config()))
"""
    for name, extra in (("file", {}), ("database", {STUDY_URI: server.uri})):
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        environment = {**os.environ, **extra}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env=environment
        )
        assert (done.returncode, done.stderr) == (0, "")
