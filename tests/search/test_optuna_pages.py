"""optuna-dashboard over a search's study: served for real, and unable to change anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.postgres import Postgres, installed
from tests.search_cases import Desk, accuracy, make_config, report
from topotune.errors import ConfigError, ResourceError, SearchFolderError
from topotune.search.place.folder import STUDY_FILE, SearchFolder
from topotune.search.study.address import study_name
from topotune.search.study.optuna_pages import serve, serving
from topotune.search.study.storage import reading
from topotune.settings import STUDY_URI

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SQLAlchemy's


@pytest.fixture
def dashboard() -> None:
    pytest.importorskip(
        "optuna_dashboard", reason="optuna-dashboard is not installed: extra 'dashboards'"
    )


def ask(url: str, method: str = "GET", host: str = "") -> tuple[int, bytes]:
    """Status and body of an answer, whatever it is."""
    data = b"{}" if method in ("POST", "PUT") else None
    request = urllib.request.Request(url, data, {"Host": host} if host else {}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def check_pages(url: str, name: str, objectives: list[str]) -> None:
    """The study's page, its numbers over the API, and that nothing is changed through it."""
    base, _, number = url.partition("/dashboard/studies/")
    status, page = ask(url)
    assert (status, b"Optuna Dashboard" in page) == (200, True)
    (study,) = json.loads(ask(f"{base}/api/studies")[1])["study_summaries"]
    assert (study["study_name"], study["study_id"]) == (name, int(number))
    study = json.loads(ask(f"{base}/api/studies/{number}")[1])
    assert study["objective_names"] == objectives
    assert [trial["state"] for trial in study["trials"]] == ["Complete"] * 3
    assert ask(f"{base}/api/studies/{number}/param_importances")[0] == 200
    for method, path in (
        ("DELETE", f"/api/studies/{number}"),
        ("POST", "/api/studies"),
        ("POST", f"/api/studies/{number}/rename"),
        ("PUT", f"/api/studies/{number}/note"),
        ("POST", "/api/trials/1/tell"),
    ):
        status, body = ask(base + path, method)
        assert status == 403
        assert json.loads(body)["reason"].startswith("read-only: topotune shows the study")
    assert ask(f"{base}/api/studies", host="evil.example")[0] == 403
    assert ask(f"{base}/api/studies", host="localhost:1")[0] == 200


@pytest.mark.usefixtures("dashboard")
def test_the_command_serves_the_study_until_it_is_told_to_end(tmp_path: Path) -> None:
    goals = [
        {"metric": "val_accuracy", "direction": "maximize"},
        {"metric": "val_loss", "direction": "minimize"},
    ]
    desk = Desk(tmp_path, make_config(budget={"trials": 3, "epochs": 2}, objective=goals))
    desk.run(lambda spec, epoch: report(spec, epoch, val_loss=1 - accuracy(spec, epoch)))
    command = [sys.executable, "-m", "topotune", "dashboard", "--optuna", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--results-dir", str(tmp_path)],  # without a name: it is the only search
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words[:3] == ["optuna-dashboard", "of", "demo:"], words
        assert process.stdout.readline() == "read-only; Ctrl-C ends it\n"
        check_pages(words[3], "demo", ["val_accuracy", "val_loss"])
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "")
    assert desk.rows()[0].state == "COMPLETE"


@pytest.mark.usefixtures("dashboard")
@pytest.mark.skipif(not installed(), reason="PostgreSQL's server is not installed")
def test_a_study_in_a_database_is_shown_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Postgres() as server:
        monkeypatch.setenv(STUDY_URI, server.uri)
        address = server.uri.replace(f":{server.password}", "")
        config = make_config(study={"uri": address}, budget={"trials": 3, "epochs": 2})
        desk = Desk(tmp_path, config)
        desk.run()
        desk.store.close()
        with serving(desk.folder, config, 0) as url:
            check_pages(url, study_name(desk.folder, config), ["val_accuracy"])
            assert server.password not in url
            line = Path(f"/proc/{os.getpid()}/cmdline").read_bytes()
            assert server.password.encode() not in line
        check_refusal(desk.folder)


def test_the_study_itself_refuses_writes(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config(budget={"trials": 1, "epochs": 1}))
    desk.run()
    check_refusal(desk.folder)


def check_refusal(folder: SearchFolder) -> None:
    with reading(folder, folder.config()) as storage:
        study = storage.get_study_id_from_name(study_name(folder, folder.config()))
        before = len(storage.get_all_trials(study))
        with pytest.raises(ResourceError, match=r"readonly|read-only"):
            storage.set_study_user_attr(study, "key", "value")
        with pytest.raises(ResourceError, match=r"readonly|read-only"):
            storage.delete_study(study)
        assert len(storage.get_all_trials(study)) == before > 0


def test_without_the_package_the_command_for_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    SearchFolder.create(tmp_path, make_config(), "")
    with pytest.raises(ConfigError, match=r"--optuna: .* pip install .*'optuna-dashboard>="):
        serve(tmp_path, "demo", 0, print)


def test_which_search_must_be_clear(tmp_path: Path) -> None:
    with pytest.raises(SearchFolderError, match=r"\(there: none\)"):
        serve(tmp_path, None, 0, print)
    for name in ("demo", "other"):
        SearchFolder.create(tmp_path, make_config(name=name), "")
    with pytest.raises(SearchFolderError, match=r"\(there: demo, other\). Name it: topotune dash"):
        serve(tmp_path, None, 0, print)
    with pytest.raises(ConfigError, match=r"--port: must be from 0"):
        serve(tmp_path, "demo", 65536, print)


@pytest.mark.usefixtures("dashboard")
def test_a_search_without_a_study_yet_makes_none(tmp_path: Path) -> None:
    folder = SearchFolder.create(tmp_path, make_config(), "")
    with pytest.raises(SearchFolderError, match="no trial has begun"):
        serve(tmp_path, "demo", 0, print)
    assert not (folder.root / STUDY_FILE).exists()
