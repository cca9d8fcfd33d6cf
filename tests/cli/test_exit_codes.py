"""Exit codes are the documented ones, for every command."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from topotune.cli.main import app

ROOT = Path(__file__).parents[2]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "topotune", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def commands() -> list[str]:
    text = CliRunner().invoke(app, ["--help"]).output
    return re.findall(r"^  ([a-z]+)  ", text.partition("Commands:")[2], re.MULTILINE)


FILES = ("search", "check", "train", "submit")
NAMES = ("resume", "status", "best", "plot", "dashboard", "sync", "export", "logs", "stop")
MISSING: dict[str, list[str] | None] = {
    **{command: ["no_such_file.yaml"] for command in FILES},
    **{command: ["nothing"] for command in NAMES},
    "extend": ["nothing", "--trials", "1"],
    "schema": ["--out", "no/such/folder/x.json"],
    "spaces": ["--copy", "/proc/no"],
    "doctor": ["--no-ray", "--results-dir", "/proc/no"],
    "list": [],
    "tasks": None,
    "bench": None,
}


def test_every_command_has_a_row() -> None:
    assert sorted(commands()) == sorted(MISSING)


@pytest.mark.parametrize("command", sorted(MISSING))
def test_what_the_user_must_change_ends_with_2(command: str, tmp_path: Path) -> None:
    calls = [[command, "--no-such-option"]]
    if (arguments := MISSING[command]) is not None:
        calls.append([command, *arguments])
    for call in calls:
        process = start(tmp_path, *call)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 2, out + err
        assert "Traceback" not in err
        assert err or "BROKEN" in out
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("arguments", [["--help"], ["schema"], ["tasks"], ["spaces"]], ids=str)
def test_a_reader_that_goes_away_is_no_failed_run(arguments: list[str], tmp_path: Path) -> None:
    with start(tmp_path, *arguments) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 2


def test_an_interrupt_ends_with_130(tmp_path: Path) -> None:
    process = start(tmp_path, "check", "adam_digits")
    time.sleep(1.5)  # it imports torch by then
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=100)[1]
    assert process.returncode == 130
