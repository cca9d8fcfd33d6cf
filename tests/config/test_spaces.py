"""The shipped search files are found by name, in a checkout and where a wheel was installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from topotune.cli.main import app
from topotune.config.file import load_search
from topotune.config.spaces import (
    SCHEMA_FILE,
    copy_spaces,
    find_space,
    shipped_folder,
    shipped_spaces,
)
from topotune.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_a_checkout_uses_the_files_at_its_root() -> None:
    assert shipped_folder() == ROOT / "search_spaces"
    assert len(shipped_spaces()) == 19
    assert find_space("adam_digits") == ROOT / "search_spaces" / "adam_digits.yaml"


def test_a_file_of_that_name_goes_first_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adam_digits").mkdir()
    assert find_space("adam_digits") == shipped_folder() / "adam_digits.yaml"
    (tmp_path / "adam_mnist").write_text("name: mine\n", encoding="utf-8")
    assert find_space("adam_mnist") == Path("adam_mnist")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("adam_digit", ("'adam_digits'",)),
        ("search_spaces/adam_mnist5k.yaml", ("'adam_mnist5k'",)),
        ("mine.yml", ("'mine.yaml'",)),
        ("quite_another_thing", ()),
    ],
)
def test_a_missing_file_names_files_and_shipped_ones(
    given: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\n", encoding="utf-8")
    for command in ("check", "search", "submit"):
        found = CliRunner().invoke(app, [command, given])
        text = str(found.exception)
        assert isinstance(found.exception, ConfigError)
        assert text.startswith(
            f"{given}: there is no such file, and no search file of that name is"
        )
        assert "'topotune spaces'" in text
        assert all(word in text for word in words), text
        assert ("did you mean" in text) == bool(words)


def test_copies_work_as_they_are_and_overwrite_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    copies = copy_spaces(folder)
    assert len(copies) == 20
    assert (folder / SCHEMA_FILE) in copies
    assert load_search(folder / "adam_digits.yaml").name == "adam_digits"
    copy_spaces(folder)  # the same again is no change
    (folder / "adam_digits.yaml").write_text("name: mine\n", encoding="utf-8")
    (folder / "adam_mnist.yaml").unlink()
    with pytest.raises(ConfigError, match=r"would overwrite .*adam_digits\.yaml\. Move"):
        copy_spaces(folder)
    assert (folder / "adam_digits.yaml").read_text(encoding="utf-8") == "name: mine\n"
    assert not (folder / "adam_mnist.yaml").exists()
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        copy_spaces(folder / "adam_digits.yaml")


def test_a_wheel_has_them_inside_the_package(tmp_path: Path) -> None:
    site, here = tmp_path / "site", tmp_path / "empty"
    here.mkdir()
    shutil.copytree(ROOT / "topotune", site / "topotune", ignore=shutil.ignore_patterns("*.pyc"))
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, target in wheel["force-include"].items():
        shutil.copytree(ROOT / source, site / target)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "topotune", *arguments],
            cwd=here,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert list(json.loads(run("spaces", "--json"))) == list(shipped_spaces())
    assert "adam_digits: adam on digits" in run("check", "--quick", "adam_digits")
    copies = json.loads(run("spaces", "--copy", "mine", "--json"))
    assert len(copies) == 20
    assert str(here) not in copies[0]
    assert "ok" in run("check", "--quick", copies[0])


def complete(words: str, folder: Path) -> list[str]:
    """What bash is offered for the last of these words."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "topotune")],
        cwd=folder,
        env={
            **os.environ,
            "_TOPOTUNE_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout.split()


def test_the_shell_completes_files_shipped_ones_and_searches(tmp_path: Path) -> None:
    (tmp_path / "adam_mine.yaml").touch()
    (tmp_path / "topotune-results/adam_run").mkdir(parents=True)
    (tmp_path / "topotune-results/adam_run/search.json").touch()
    (tmp_path / "topotune-results/adam_other").mkdir()
    assert complete("topotune check adam_m", tmp_path) == [
        "adam_mnist",
        "adam_mnist5k",
        "adam_mine.yaml",
    ]
    assert complete(f"topotune check {tmp_path}/ad", tmp_path) == [f"{tmp_path}/adam_mine.yaml"]
    assert complete("topotune status a", tmp_path) == ["adam_run"]
    assert complete("topotune best --results-dir s3://bucket/x a", tmp_path) == []
    assert "spaces" in complete("topotune sp", tmp_path)
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "--install-completion" in shown
    assert "--show-completion" in shown
