"""Faults of the clock: set back while a search runs."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.faults.invariants import audit
from tests.faults.site import STALL, Seen, Site

HOUR = 3600
# Imported by every Python process of the site: its wall clock is off by what a file says.
SHIM = """
import os, time
_time, _time_ns, _file = time.time, time.time_ns, os.environ.get("TOPOTUNE_CLOCK_FILE")

def _offset():
    try:
        with open(_file) as file:
            return int(file.read() or 0)
    except OSError:
        return 0

if _file:
    time.time = lambda: _time() + _offset()
    time.time_ns = lambda: _time_ns() + _offset() * 10**9
"""


@pytest.mark.faults
def test_clock_set_back(site: Site, seen: Seen) -> None:
    """Clock set back an hour in driver and workers: no negative durations anywhere, no false
    time-outs."""
    clock = site.folder / "clock"
    clock.write_text("0", encoding="ascii")
    (site.folder / "shim").mkdir()
    (site.folder / "shim" / "sitecustomize.py").write_text(SHIM, encoding="utf-8")
    path = [str(site.folder / "shim"), site.environment().get("PYTHONPATH", "")]
    env = {"TOPOTUNE_CLOCK_FILE": str(clock), "PYTHONPATH": ":".join(filter(None, path))}
    site.search_file(limits={"stall": STALL})
    driver = site.search(1, 1, env=env)
    jumped = site.epochs(1)[-1].timestamp_ms
    write(clock, -HOUR)
    driver.finish()
    check_stamps(site, jumped)
    seen(f"set back an hour in trial 1; {audit(site)}")


def write(clock: Path, offset: int) -> None:
    partial = clock.with_suffix(".new")
    partial.write_text(str(offset), encoding="ascii")
    partial.replace(clock)


def check_stamps(site: Site, jumped: int) -> None:
    for trial in range(4):
        stamps = [report.timestamp_ms for report in site.epochs(trial)]
        assert stamps == sorted(stamps), f"trial {trial}: stamps {stamps}"
        assert all(r.seconds >= 0 for r in site.epochs(trial)), f"trial {trial}: negative seconds"
    # Else the shim did nothing, and this row showed nothing.
    late = site.epochs(3)[-1].timestamp_ms
    assert late < jumped, f"the clock was not set back: {jumped} then, {late} later"
    status = site.status()
    assert 0 < status["wall_seconds"] < HOUR / 2, f"wall time {status['wall_seconds']}"
    spent = [row["device_seconds"] for row in status["trials"]]
    assert all(0 < seconds < HOUR / 2 for seconds in spent), f"device seconds {spent}"
    with closing(sqlite3.connect(site.results / "mlflow" / "mlflow.db")) as store:
        runs = store.execute("SELECT name, start_time, end_time FROM runs").fetchall()
    assert len(runs) == 5
    backwards = [row for row in runs if row[2] is None or row[2] < row[1]]
    assert not backwards, f"MLflow's runs end before they begin: {backwards}"
