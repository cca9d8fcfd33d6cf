"""What goes to a cluster and what comes back, and where a command is sent: without a cluster."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from topotune.cli.options import DEFAULT_RESULTS, Address, RayAddress, ResultsDir, elsewhere
from topotune.errors import ConfigError, ResourceError, RunError
from topotune.search.code.shipped import ENV_FILE, SEARCH_FILE, from_archive, to_archive
from topotune.search.code.usercode import import_paths, own_modules
from topotune.service import ship as shipping
from topotune.service.ask import RemoteError, failure, printed
from topotune.service.jobs import Job
from topotune.service.ship import pack
from topotune.settings import VARIABLES, apply_settings, read_env_file


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A user's folder: a task that imports a module and a package of the user's."""
    root = tmp_path / "user"
    (root / "own_parts").mkdir(parents=True)
    (root / "own_task.py").write_text("import torch, json\nfrom own_helper import x\n")
    (root / "own_helper.py").write_text("def late():\n    import own_parts.inner\n")
    (root / "own_parts" / "__init__.py").write_text("")
    (root / "own_parts" / "inner.py").write_text("import own_task  # a circle\n")
    (root / "own_parts" / ".secret").write_text("password")
    (root / "unrelated.py").write_text("")
    (root / "torch.py").write_text("")  # an import finds the installed one
    (root / "json.py").write_text("")
    (root / "numbers.csv").write_text("1")
    return root


def packed(target: Path) -> set[str]:
    return {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}


def ship(root: Path, target: Path, **more: Any) -> set[str]:
    target.mkdir()
    pack(target, "name: x\n", {"task": {"name": "own_task:Task"}}, root, **more)
    return packed(target)


def test_modules_of_the_folder_go_along_with_what_they_import_and_nothing_else(
    user: Path, tmp_path: Path
) -> None:
    found = own_modules(["own_task"], user)
    assert [path.name for path in found] == ["own_helper.py", "own_parts", "own_task.py"]
    assert own_modules(["torch", "json", "topotune", "not_there"], user) == []
    assert ship(user, tmp_path / "package") == {
        SEARCH_FILE, "own_task.py", "own_helper.py", "own_parts/__init__.py", "own_parts/inner.py",
    }  # fmt: skip


def test_import_paths_are_found_wherever_they_stand() -> None:
    data = {
        "task": {"name": "one.inner:Task"},
        "method": {"name": "adam"},
        "list": ["two:Field", {"deep": "three.x.y:Z"}, 1, None],
        "text": "see http://four:80 or five:Six, seven:",
    }
    assert import_paths(data) == {"one", "two", "three"}


def test_a_module_that_is_no_python_is_shipped_as_it_is(user: Path) -> None:
    (user / "own_helper.py").write_bytes(b"\0 def (")
    assert [path.name for path in own_modules(["own_task"], user)] == [
        "own_helper.py",
        "own_task.py",
    ]


def test_named_files_go_along_and_replace_nothing(user: Path, tmp_path: Path) -> None:
    (tmp_path / "beside.txt").write_text("")
    include = [Path("numbers.csv"), tmp_path / "beside.txt"]
    assert ship(user, tmp_path / "package", include=include) > {"numbers.csv", "beside.txt"}
    (user / SEARCH_FILE).write_text("name: other\n")
    for wrong, words in ((SEARCH_FILE, "would replace"), (".", "would replace"), ("no", "no no")):
        with pytest.raises(ConfigError, match=words):
            ship(user, tmp_path / f"package-{words[:3]}-{wrong}", include=[Path(wrong)])


def test_too_much_is_refused_with_what_is_large(
    user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "MAX_BYTES", 2**20)
    (user / "own_parts" / "data.bin").write_bytes(bytes(2**20 + 1))
    with pytest.raises(ConfigError, match=r"1 MiB \(1 allowed\), most of it in own_parts"):
        ship(user, tmp_path / "package")


def test_variables_travel_in_a_file_for_its_owner_only(user: Path, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# stores\nexport PGPASSWORD='a b=c'\n\nEMPTY=\n")
    previous = os.umask(0)
    try:
        ship(user, tmp_path / "package", env_file=file)
    finally:
        os.umask(previous)
    shipped = tmp_path / "package" / ENV_FILE
    assert stat.S_IMODE(shipped.stat().st_mode) == 0o600
    assert read_env_file(shipped) == {"PGPASSWORD": "a b=c", "EMPTY": ""}
    file.write_text("A=1\nhunter2\n")
    with pytest.raises(ConfigError, match=r"env:2.*NAME=value") as caught:
        read_env_file(file)
    assert "hunter2" not in str(caught.value)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES.values(), "TOPOTUNE_CONFIG"):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes away what is set below
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("bare")
def test_the_environment_stands_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOPOTUNE_ADDRESS", "http://of-environment:8265")
    (tmp_path / "topotune.toml").write_text(
        'address = "http://of-file:8265"\nstorage = "shared"\ntracking_uri = "http://m:5000"\n'
    )
    apply_settings(tmp_path)
    assert os.environ["TOPOTUNE_ADDRESS"] == "http://of-environment:8265"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://m:5000"
    assert os.environ["TOPOTUNE_STORAGE"] == str(tmp_path / "shared")
    assert "TOPOTUNE_STUDY_URI" not in os.environ


@pytest.mark.usefixtures("bare")
def test_a_settings_file_elsewhere_and_storage_that_is_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.toml"
    other.write_text('storage = "s3://bucket/searches"\n')
    monkeypatch.setenv("TOPOTUNE_CONFIG", str(other))
    apply_settings(tmp_path / "nowhere")
    assert os.environ["TOPOTUNE_STORAGE"] == "s3://bucket/searches"
    other.unlink()
    with pytest.raises(ConfigError, match="TOPOTUNE_CONFIG"):
        apply_settings(tmp_path)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('adress = "x"', "unknown key 'adress'.*address"),
        ("storage = 3", "storage: must be a text"),
        ('storage = ""', "must be a text"),
        ("storage = ", "is no TOML"),
        ('study_uri = "postgresql://me:hunter2@db/x"', "holds a password.*TOPOTUNE_STUDY_URI"),
        ('tracking_uri = "http://me:hunter2@m:5000"', "holds a password.*MLFLOW_TRACKING_URI"),
    ],
)
def test_a_settings_file_that_is_wrong_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "topotune.toml").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        apply_settings(tmp_path)
    assert "hunter2" not in str(caught.value)
    assert not any(name in os.environ for name in VARIABLES.values())


def test_a_folder_comes_back_as_it_was_sent(user: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    from_archive(to_archive(user), target)
    assert packed(target) == packed(user)
    for name in packed(user):
        assert (target / name).read_bytes() == (user / name).read_bytes()


@pytest.mark.parametrize("kind", ["up", "link", "damaged", "empty"])
def test_an_archive_writes_nowhere_else(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("../planted" if kind == "up" else "inner")
        if kind == "link":
            entry.type, entry.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(entry)
    content = {"damaged": buffer.getvalue()[:20], "empty": b""}.get(kind, buffer.getvalue())
    with pytest.raises(RunError, match="cannot be unpacked"):
        from_archive(content, target)
    assert list(tmp_path.iterdir()) == [target]
    assert list(target.iterdir()) == []


def test_an_absolute_name_in_an_archive_stays_inside(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo(str(tmp_path / "planted")))
    from_archive(buffer.getvalue(), target)  # Python's filter takes the slash off
    assert not (tmp_path / "planted").exists()
    assert len(packed(target)) == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], "", "here"),
        (["--address", "http://typed:1"], "", "http://typed:1"),
        ([], "http://set:1", "http://set:1"),
        (["--address", "http://typed:1"], "http://set:1", "http://typed:1"),
        (["--address", "local"], "http://set:1", "here"),
        (["--results-dir", "x"], "http://set:1", "here"),
        (["--ray-address", "auto"], "http://set:1", "here"),
        (["--on-cluster", "1"], "http://set:1", "here"),
        (["--results-dir", "x", "--address", "http://typed:1"], "", "--results-dir"),
        (["--ray-address", "auto", "--address", "http://typed:1"], "", "--ray-address"),
    ],
)
def test_where_a_command_is_sent(
    arguments: list[str], environment: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, found = typer.Typer(), []

    @app.command()
    def command(
        context: typer.Context,
        results_dir: ResultsDir = DEFAULT_RESULTS,
        ray_address: RayAddress = "local",
        address: Address = None,
        on_cluster: str | None = None,
    ) -> None:
        try:
            found.append(elsewhere(context, address) or "here")
        except ConfigError as error:
            found.append(error.place)

    monkeypatch.setenv("TOPOTUNE_ADDRESS", environment)
    monkeypatch.setenv("TOPOTUNE_STORAGE", "/of/the/environment")  # is not typed
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert found == [expected]


RAYS = "2026 INFO job_manager.py -- Runtime env is setting up.\nRunning entrypoint for job x: y\n"


def ended(code: int | None, status: str = "FAILED", message: str = "") -> Job:
    return Job("job-1", "rings", "search", "ada", status, 0.0, code, message)


def test_what_a_job_printed_is_without_rays_own_lines() -> None:
    assert printed(RAYS + "one\ntwo\n") == "one\ntwo"
    assert printed("alone\n") == "alone"
    assert printed("") == ""


@pytest.mark.parametrize(
    ("code", "log"),
    [
        (1, "/usr/bin/python: No module named topotune"),
        (1, "ModuleNotFoundError: No module named 'typer'"),
        (127, "bash: line 1: python: not found"),
        (2, "No such option: --on-cluster"),
    ],
)
def test_a_cluster_without_topotune_says_what_to_install(code: int, log: str) -> None:
    error = failure(ended(code), RAYS + log)
    assert isinstance(error, ResourceError)
    assert log in str(error)
    assert "TOPOTUNE_PYTHON" in str(error)
    assert error.exit_code == 2


def test_a_drivers_own_error_is_passed_on_with_its_exit_code() -> None:
    log = "error: first\nnote something\nerror: f:2: task: unknown\nerror: f:3: method: unknown\n"
    error = failure(ended(2), RAYS + log)
    assert isinstance(error, RemoteError)
    assert (str(error), error.exit_code) == ("f:2: task: unknown; f:3: method: unknown", 2)


def test_a_job_that_said_nothing_is_told_by_rays_message() -> None:
    assert "the node died" in str(failure(ended(None, message="the node died"), RAYS))
    assert "it printed nothing" in str(failure(ended(None), ""))
    assert "stopped" in str(failure(ended(None, "STOPPED"), RAYS + "half a line"))
