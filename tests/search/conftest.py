"""A real PostgreSQL server for the tests of a study in a database, and a search that uses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import Postgres, installed
from tests.search_cases import Desk, make_config
from topotune.search.place.addresses import remembered
from topotune.settings import STUDY_URI


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    if not installed():
        pytest.skip("PostgreSQL's server (initdb, postgres) is not installed")
    with Postgres() as running:
        yield running


@pytest.fixture
def desk(server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setenv(STUDY_URI, server.uri)
    opened = Desk(tmp_path, remembered(make_config()))
    yield opened
    opened.store.close()
