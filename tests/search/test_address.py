"""Where a study is kept: addresses, what is remembered of them, and a real PostgreSQL."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.postgres import Postgres
from tests.search_cases import Desk, make_config
from topotune.errors import ConfigError, ResourceError
from topotune.search.place.addresses import public_study, remembered, study_place, study_uri
from topotune.search.place.folder import STUDY_COPY, SearchFolder
from topotune.search.study.address import study_name
from topotune.search.study.database import check_study, open_database
from topotune.search.study.rows import summaries
from topotune.settings import STUDY_URI

FULL = "postgresql://me:s3cret@db:5433/studies?sslmode=require&password=s3cret"


def test_what_is_remembered_holds_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STUDY_URI, FULL)
    config = remembered(make_config())
    assert config.study.uri == "postgresql://me@db:5433/studies?sslmode=require"
    url = study_uri(config)
    assert url is not None
    assert url.password == "s3cret"
    assert "s3cret" not in public_study(url)


def test_the_environment_adds_a_password_to_the_same_database_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(STUDY_URI, "postgresql://me:s3cret@db/studies")
    same = make_config(study={"uri": "postgresql+psycopg://me@db:5432/studies"})
    other = make_config(study={"uri": "postgresql://me@elsewhere/studies"})
    assert remembered(same).study == same.study
    assert getattr(study_uri(same), "password", None) == "s3cret"
    assert getattr(study_uri(other), "password", None) is None
    # A search that keeps its study in its folder is not moved by a shell that names a database.
    assert study_uri(make_config()) is None


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://me:s3cret@db/studies",
        "postgresql://db/studies?password=s3cret",
        "mysql://me@db/s3cret",
        "sqlite:///s3cret.db",
    ],
)
def test_a_search_file_holds_no_password_and_only_postgresql(uri: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make_config(study={"uri": uri})
    problem = caught.value.errors()[0]
    assert "TOPOTUNE_STUDY_URI" in problem["msg"]
    assert "s3cret" not in problem["msg"]


@pytest.mark.parametrize("uri", ["mysql://me:s3cret@db/x", "postgresql://me:s3cret@db:port/x"])
def test_an_address_of_another_form_is_refused_without_being_shown(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STUDY_URI, uri)
    with pytest.raises(ConfigError, match=STUDY_URI) as caught:
        remembered(make_config())
    assert "s3cret" not in str(caught.value)


def test_searches_of_one_name_share_a_database(
    server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STUDY_URI, server.uri)
    config = remembered(make_config(constraints={"overhead_vs_adam": {"max": 2.0}}))
    desks = [Desk(tmp_path / name, config) for name in ("a", "b")]
    for desk in desks:
        assert SearchFolder.open(desk.folder.root.parent, "demo").config() == config
        desk.run()
        assert [row.number for row in desk.rows()] == list(range(6))
        assert {row.state for row in desk.rows()} == {"COMPLETE"}
        assert not (desk.folder.root / STUDY_COPY).exists()
        assert server.password not in desk.folder.meta.read_text()
    names = {study_name(desk.folder, config) for desk in desks}
    assert len(names) == 2
    monkeypatch.delenv("PGPASSWORD", raising=False)
    plain = Desk(tmp_path / "c", make_config(constraints={"overhead_vs_adam": {"max": 2.0}}))
    plain.run()
    assert [row.params for row in plain.rows()] == [row.params for row in desks[0].rows()]
    for desk in (*desks, plain):
        desk.store.close()


def test_a_connection_whose_host_vanished_is_noticed_while_an_answer_is_awaited(
    server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STUDY_URI, server.uri)
    config = remembered(make_config())
    storage = open_database(SearchFolder(tmp_path / "demo"), config)
    connection = storage._engine.raw_connection()
    handle = connection.driver_connection.fileno()  # type: ignore[union-attr]
    with socket.socket(fileno=os.dup(handle)) as probed:
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        assert [probed.getsockopt(socket.IPPROTO_TCP, one) for one in options] == [10, 5, 3]
        assert probed.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    connection.close()
    storage.close()


def test_a_wrong_password_ends_at_once_and_is_not_shown(
    server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STUDY_URI, server.uri.replace(server.password, "wr0ng"))
    monkeypatch.delenv("PGPASSWORD", raising=False)
    config = remembered(make_config())
    folder = SearchFolder(tmp_path / "demo")
    notes: list[str] = []
    with pytest.raises(ResourceError, match="password authentication failed") as caught:
        check_study(folder, config, notes.append)
    assert notes == []
    assert "wr0ng" not in str(caught.value)
    assert study_place(folder, config) == f"postgresql://tester@127.0.0.1:{server.port}/postgres"


def test_whoever_looks_at_a_study_that_is_away_is_told_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("topotune.search.study.database.READER_SECONDS", 1.0)
    config = make_config(study={"uri": "postgresql://nobody@127.0.0.1:1/none"})
    folder = SearchFolder.create(tmp_path, config, "")
    with pytest.raises(ResourceError, match=r"127\.0\.0\.1:1/none: does not answer, for"):
        summaries(folder, config)
