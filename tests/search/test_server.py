"""Which MLflow a search is sent to, session after session, and what of its address is kept."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.search_cases import make_config
from topotune.errors import ConfigError, SearchFolderError
from topotune.search.place.addresses import EXPERIMENT, experiment, public, remembered, tracking_uri
from topotune.search.place.folder import SearchFolder
from topotune.search.place.shipping import look_first, open_store
from topotune.search.status import serve, sync
from topotune.settings import TRACKING_URI
from topotune.tracking.mlflow import MlflowStore

FULL = "http://me:s3cret-w0rd@mlflow.example:5000/team"
KEPT = "http://***@mlflow.example:5000/team"


def test_an_address_is_written_down_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRACKING_URI, FULL)
    config = remembered(make_config())
    assert config.tracking.uri == KEPT
    folder = SearchFolder.create(tmp_path, config, "")
    assert "s3cret" not in folder.meta.read_text(encoding="utf-8")
    assert folder.config() == remembered(folder.config()) == config
    assert open_store(folder, folder.config()).tracking_uri == FULL


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        KEPT,
        "http://me:s3cret-w0rd@other.example:5000/team",
        "http://me:s3cret-w0rd@mlflow.example:5001/team",
        "http://me:s3cret-w0rd@mlflow.example/team",
        "http://me:s3cret-w0rd@mlflow.example:5000/another",
        "https://me:s3cret-w0rd@mlflow.example:5000/team",
        "me:s3cret-w0rd@mlflow.example:5000/team",
        "http://me:s3cret-w0rd@[mlflow.example:5000/team",
        "http://me:s3cret-w0rd@mlflow.example:99999/team",
    ],
)
def test_a_search_goes_on_with_its_own_server_only(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tracking={"uri": KEPT})
    folder = SearchFolder.create(tmp_path, config, "")
    monkeypatch.delenv(TRACKING_URI, raising=False)
    if given is not None:
        monkeypatch.setenv(TRACKING_URI, given)
    with pytest.raises(ConfigError, match=r"^MLFLOW_TRACKING_URI: .* Set MLFLOW_TRACKING_URI to "):
        open_store(folder, config)
    with pytest.raises(ConfigError) as caught:
        sync(tmp_path, folder.name, 1.0)
    assert KEPT in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert not (tmp_path / "mlflow").exists()


def test_what_names_the_same_server_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tracking={"uri": "https://***@mlflow.example"})
    for given in (
        "https://me:s3cret-w0rd@mlflow.example/",
        "https://another:new-s3cret@MLFLOW.example:443",
        "https://mlflow.example",  # with MLFLOW_TRACKING_USERNAME and _PASSWORD
    ):
        monkeypatch.setenv(TRACKING_URI, given)
        assert tracking_uri(config) == given
    plain = make_config(tracking={"uri": "https://mlflow.example"})
    monkeypatch.setenv(TRACKING_URI, "https://me:s3cret-w0rd@mlflow.example/")
    assert tracking_uri(plain) == "https://me:s3cret-w0rd@mlflow.example/"
    monkeypatch.setenv(TRACKING_URI, "https://me:s3cret-w0rd@elsewhere/")
    assert tracking_uri(plain) == "https://mlflow.example"


def test_a_search_of_before_goes_where_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was written down where the address held a password."""
    monkeypatch.setenv(TRACKING_URI, FULL)
    assert tracking_uri(make_config()) == FULL
    monkeypatch.delenv(TRACKING_URI)
    assert tracking_uri(make_config()) is None
    assert remembered(make_config()) == make_config(tracking={"experiment": "topotune"})


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (FULL, KEPT),
        ("postgresql://me:a/b@c@db:5432/m", "postgresql://***@db:5432/m"),
        ("http://mlflow-prod:mlflow-prod@mlflow-prod.lan/", "http://***@mlflow-prod.lan/"),
        ("postgresql://db/mlflow?password=s3cret", "postgresql://db/mlflow?password=***"),
        ("https://host/t0ken-0f-s0meone/x", "https://host/***/x"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("databricks", "databricks"),
    ],
)
def test_what_is_shown_of_an_address(uri: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "t0ken-0f-s0meone")
    monkeypatch.setenv(TRACKING_URI, uri)
    config = remembered(make_config())
    assert public(uri) == config.tracking.uri == shown
    assert tracking_uri(config) == uri


@pytest.mark.parametrize("timeout", [math.nan, -1.0, math.inf, -math.inf, 1e300])
def test_a_time_to_sync_for_is_one(timeout: float, tmp_path: Path) -> None:
    folder = SearchFolder.create(tmp_path, make_config(), "")
    with pytest.raises(ConfigError, match="--timeout: must be a number of seconds"):
        sync(tmp_path, folder.name, timeout)


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_of_the_dashboard_is_one(port: int, tmp_path: Path) -> None:
    SearchFolder.create(tmp_path, make_config(), "")
    with pytest.raises(ConfigError, match=rf"--port: must be from 0 .* \(got {port}\)"):
        serve(tmp_path, None, port, print)


def test_a_dashboard_of_nothing_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path / "nonexist", tmp_path):
        with pytest.raises(SearchFolderError, match=f"^{folder}: holds no .* --results-dir"):
            serve(folder, None, 5000, print)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("named", "given", "expected"),
    [
        (None, None, "topotune"),
        (None, "", "topotune"),
        (None, "ours", "ours"),
        ("its own", "ours", "its own"),
        ("topotune", "ours", "topotune"),
    ],
)
def test_the_experiment_is_the_files_else_the_environments(
    named: str | None,
    given: str | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(TRACKING_URI, raising=False)
    monkeypatch.delenv(EXPERIMENT, raising=False)
    if given is not None:
        monkeypatch.setenv(EXPERIMENT, given)
    plain = make_config(tracking={} if named is None else {"experiment": named})
    config = remembered(plain)
    assert config.tracking.experiment == expected
    folder = SearchFolder.create(tmp_path, config, "")
    said: list[str] = []
    look_first(folder, config, said.append)
    assert bool(said) == (given not in (None, "", expected))

    # Another shell's name does not move it, and is said.
    monkeypatch.setenv(EXPERIMENT, "elsewhere")
    assert experiment(folder.config()) == open_store(folder, folder.config()).experiment == expected
    said.clear()
    look_first(folder, folder.config(), said.append)
    assert said == [
        f"{EXPERIMENT} is 'elsewhere'; demo is recorded in its own experiment, {expected!r}"
    ]
    assert not (tmp_path / "mlflow").exists()


def test_an_experiments_number_is_said_not_to_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "17")
    config = remembered(make_config())
    said: list[str] = []
    look_first(SearchFolder(tmp_path / "demo"), config, said.append)
    assert len(said) == 1
    assert "MLFLOW_EXPERIMENT_ID does not count" in said[0]


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "http://nowhere.invalid:5000"])
def test_a_server_that_does_not_answer_is_said_at_once(uri: str, tmp_path: Path) -> None:
    config = remembered(make_config(tracking={"uri": uri}))
    said: list[str] = []
    look_first(SearchFolder(tmp_path / "demo"), config, said.append)
    assert len(said) == 1
    assert said[0].startswith(f"warning: tracking store {uri} experiment topotune does not answer:")
    assert "stop now and mend it" in said[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's use of SQLAlchemy
def test_a_look_makes_nothing(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'theirs.db'}"
    MlflowStore(uri, "theirs").ping()
    config = remembered(make_config(tracking={"uri": uri, "experiment": "ours"}))
    said: list[str] = []
    look_first(SearchFolder(tmp_path / "demo"), config, said.append)
    names = {one.name for one in MlflowStore(uri, "theirs").client().search_experiments()}
    assert (said, names) == ([], {"Default", "theirs"})


@pytest.mark.parametrize("uri", ["http://", "https:///x", "http://host name", "http://:5000"])
def test_an_address_without_a_host_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="names no host"):
        tracking_uri(make_config(tracking={"uri": uri}))


@pytest.mark.heavy
def test_experiments_of_one_embedded_store_are_served_together(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        config = remembered(make_config(name=name, tracking={"experiment": name}))
        SearchFolder.create(tmp_path, config, "")
    command = ["-m", "topotune", "dashboard", "--port", "0", "--results-dir", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = []
        while (line := process.stdout.readline()) and "Ctrl-C ends it" not in line:
            said.append(line)
        time.sleep(1.0)  # until it waits
        process.send_signal(signal.SIGINT)
        after, errors = process.communicate(timeout=60)
    assert (process.returncode, after, errors) == (0, "", "")
    assert [line.partition(":")[0] for line in said] == [
        *("starting the MLflow server; this takes some seconds\n", "MLflow", "MLflow"),
    ]
    first, second = (line.partition("/#/")[0] for line in said[1:])
    assert first == second
