"""The clock of the live table goes on while the driver is busy with something else."""

from __future__ import annotations

import time

import pytest

from topotune.cli.live import LiveTable
from topotune.search.view import SearchView


@pytest.mark.parametrize(
    ("phase", "word"), [("draining", "draining"), ("done", "saving and sending what is left")]
)
def test_the_clock_goes_on_between_two_ticks(
    phase: str, word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with LiveTable("val_accuracy") as table:
        table.tick(SearchView("demo", phase, {"RUNNING": 1}, 6, 4, wall_seconds=75.0))
        time.sleep(2.2)
    shown = capsys.readouterr().out
    for clock in ("1m15s", "1m16s", "1m17s"):
        assert f"{clock} elapsed, {word}" in shown
