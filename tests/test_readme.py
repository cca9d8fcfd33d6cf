"""What the README and docs show is true: files load, code runs, commands and links exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from topotune.cli.main import app
from topotune.config.file import parse_search, parse_yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = "\n".join([README, *(path.read_text(encoding="utf-8") for path in DOCS)])
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGES, re.DOTALL)
LINKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md", *DOCS]


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def commands() -> list[list[str]]:
    """Every topotune command line of the pages."""
    lines = [line.partition("#")[0] for text in blocks("console") for line in text.splitlines()]
    lines += re.findall(r"`(topotune [^`]*)`", PAGES)
    found = [re.search(r"(?:^|/)topotune (.*)$", line) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


def test_the_commands_that_install_and_test_are_what_ci_runs() -> None:
    install, _, tests = (text.strip() for text in blocks("console")[:3])
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    setup = install.split(" && ")
    with_dev, run_tests = tests.split(" && ")
    assert run_tests in script
    for command in (setup[1], setup[2], with_dev):
        quiet = command.replace("uv venv", "uv venv --quiet")
        assert f"{quiet.replace('uv pip install', 'uv pip install --quiet')}\n" in script
    assert shlex.split(setup[3])[1] == "search"
    assert "--group" not in install  # a user needs no linters
    assert with_dev == f"{setup[2]} --group dev"


def test_the_pair_for_cpus_is_the_pinned_one() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pair,) = re.findall(r"`(torch==\S+) (torchvision==\S+)`", PAGES)
    assert set(pair) <= set(pinned)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_search_files_load(text: str) -> None:
    data, lines = parse_yaml(text.encode(), "README.md")
    assert parse_search(data, "README.md", lines).space


def test_code_runs_in_order(tmp_path: Path) -> None:
    code = "\n".join(blocks("python"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    energy, step = done.stdout.split(maxsplit=1)
    assert float(energy) > 0
    assert "20" in step


def test_the_readme_task_is_the_tested_one() -> None:
    tested = (ROOT / "tests" / "user_task.py").read_text(encoding="utf-8").partition("\n\n")[2]
    assert tested.strip() in PAGES


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_and_option_exists(arguments: list[str]) -> None:
    names = [word for word in arguments if not word.startswith("-")]
    depth = 2 if names[:1] == ["bench"] else 1
    shown = CliRunner().invoke(app, [*names[:depth], "--help"])
    assert shown.exit_code == 0, shown.output
    for option in (word for word in arguments if word.startswith("--")):
        assert option in shown.output


def test_files_that_commands_name_exist() -> None:
    for arguments in commands():
        for word in arguments:
            if word.startswith("search_spaces/"):
                assert (ROOT / word).is_file()


@pytest.mark.parametrize("page", LINKED, ids=lambda path: str(path.name))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_architecture_names_files_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    names = re.findall(r"`([\w./]+(?:/|\.py))`", text)
    homes = (ROOT, ROOT / "topotune", ROOT / "topotune" / "search", ROOT / "tests" / "search")
    assert len(names) > 60
    assert not [name for name in names if not any((home / name).exists() for home in homes)]
