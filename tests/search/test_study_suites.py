"""Optuna's own suites for storages and samplers, on ours."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from optuna.testing.pytest_storages import StorageTestCase

from tests.postgres import Postgres
from tests.search_cases import make_config
from topotune.search.place.addresses import remembered
from topotune.search.place.folder import SearchFolder
from topotune.search.study import samplers
from topotune.search.study.database import PatientStorage, open_database
from topotune.search.study.journal import Journal
from topotune.search.study.patience import Patience
from topotune.search.study.storage import ReplicatedStorage
from topotune.settings import STUDY_URI


class _Suite(StorageTestCase):
    @pytest.mark.skip(reason="a study has one driver: no storage of ours is sent elsewhere")
    def test_pickle_storage(self, storage: BaseStorage) -> None:
        pickle.dumps(storage)


class TestJournal(_Suite):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> JournalStorage:
        return JournalStorage(Journal((tmp_path / "study", tmp_path / "copy")))


@pytest.fixture
def database(
    server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PatientStorage]:
    monkeypatch.setenv(STUDY_URI, server.uri)
    config = remembered(make_config())
    opened = open_database(SearchFolder(tmp_path), config, Patience("here", limit=5.0))
    for study in opened.get_all_studies():
        opened.delete_study(study._study_id)
    yield opened
    opened.close()


@pytest.mark.heavy
class TestPatientPostgres(_Suite):
    @pytest.fixture
    def storage(self, database: PatientStorage) -> PatientStorage:
        return database


@pytest.mark.heavy
class TestReplicatedPostgres(_Suite):
    @pytest.fixture
    def storage(self, database: PatientStorage, tmp_path: Path) -> ReplicatedStorage:
        journal = Journal((tmp_path / "study",), anew=True)
        return ReplicatedStorage(database, JournalStorage(journal), lambda: None)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
class TestQmc(BasicSamplerTestCase, RelativeSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: samplers.QMCSampler(make_config(), 3)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
class TestNsga2(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: samplers.NSGAIISampler(seed=3)
