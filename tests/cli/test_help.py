"""The list of commands is whole on a usual terminal."""

from __future__ import annotations

from typer.testing import CliRunner

from topotune.cli.main import app


def test_no_summary_of_a_command_is_cut() -> None:
    shown = CliRunner().invoke(app, ["-h"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    _, _, commands = shown.output.partition("Commands:")
    assert "search" in commands
    assert "..." not in commands
