"""Faults of the clock: set back while a search runs."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from topotune.bench.faults.invariants import audit
from topotune.bench.faults.scenario import Scenario, expect
from topotune.bench.faults.site import Site
from topotune.bench.faults.workers import STALL

HOUR = 3600
# Imported by every Python process of the site: its wall clock is off by what a file says.
_SHIM = """
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


def _set_back(site: Site) -> str:
    clock = site.folder / "clock"
    clock.write_text("0", encoding="ascii")
    (site.folder / "shim").mkdir()
    (site.folder / "shim" / "sitecustomize.py").write_text(_SHIM, encoding="utf-8")
    path = [str(site.folder / "shim"), site.environment().get("PYTHONPATH", "")]
    env = {"TOPOTUNE_CLOCK_FILE": str(clock), "PYTHONPATH": ":".join(filter(None, path))}
    driver = site.start("search", site.search_file(limits={"stall": STALL}), env=env)
    site.reach(driver, 1, 1)
    jumped = site.epochs(1)[-1].timestamp_ms
    _write(clock, -HOUR)
    driver.finish()
    _check_stamps(site, jumped)
    return f"set back an hour in trial 1; {audit(site)}"


def _write(clock: Path, offset: int) -> None:
    partial = clock.with_suffix(".new")
    partial.write_text(str(offset), encoding="ascii")
    partial.replace(clock)


def _check_stamps(site: Site, jumped: int) -> None:
    for trial in range(4):
        stamps = [report.timestamp_ms for report in site.epochs(trial)]
        expect(stamps == sorted(stamps), f"trial {trial}: stamps {stamps}")
        expect(all(r.seconds >= 0 for r in site.epochs(trial)), f"trial {trial}: negative seconds")
    # Else the shim did nothing, and this row showed nothing.
    late = site.epochs(3)[-1].timestamp_ms
    expect(late < jumped, f"the clock was not set back: {jumped} then, {late} later")
    status = site.status()
    expect(0 < status["wall_seconds"] < HOUR / 2, f"wall time {status['wall_seconds']}")
    spent = [row["device_seconds"] for row in status["trials"]]
    expect(all(0 < seconds < HOUR / 2 for seconds in spent), f"device seconds {spent}")
    with closing(sqlite3.connect(site.results / "mlflow" / "mlflow.db")) as store:
        runs = store.execute("SELECT name, start_time, end_time FROM runs").fetchall()
    backwards = [row for row in runs if row[2] is None or row[2] < row[1]]
    expect(len(runs) == 5 and not backwards, f"MLflow's runs end before they begin: {backwards}")


CLOCKS = (
    Scenario(
        "clock-set-back",
        "clock set back an hour in driver and workers",
        "no negative durations anywhere, no false time-outs",
        _set_back,
        45,
    ),
)
