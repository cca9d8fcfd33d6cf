"""Faults of the driver's surroundings: signals, a terminal that closes, a machine that sleeps."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import signal
import subprocess
import termios
import time
from contextlib import suppress
from functools import partial
from typing import Any

import psutil
import pytest

from tests.faults.invariants import audit, reference
from tests.faults.site import GONE_WITHIN, INTERRUPTED, NAME, STALL, Driver, Seen, Site
from tests.faults.task import PAUSE
from topotune.search.ray.pulse import DRAIN_SECONDS
from topotune.search.study.ledger import MAX_GAP

MINUTE = 12.0
"""Seconds a batch, so that an epoch takes a minute and cannot be waited for."""
SLACK = 25.0
"""Device seconds that the same search may take longer, on a busy machine or by a restart."""
AT_START = (
    (signal.SIGINT, "checking", 0.0),
    (signal.SIGTERM, "starting Ray", 0.3),
    (signal.SIGHUP, "starting Ray", 1.5),
    (signal.SIGTERM, "starting Ray", 3.0),
    (signal.SIGINT, "starting Ray", 0.3),
)
"""Signal, what the command has said by then, and seconds after that."""
KILLS = 10


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="sigint", marks=pytest.mark.faults),
        pytest.param(signal.SIGTERM, id="sigterm", marks=pytest.mark.faults_full),
        pytest.param(signal.SIGHUP, id="sighup", marks=pytest.mark.faults_full),
    ],
)
def test_stopped_by(site: Site, seen: Seen, number: signal.Signals) -> None:
    """A signal to the driver: trials drain, all is saved, exit code 130, every process gone within
    20 s; resumable."""
    site.search_file({"pause": 0.3})
    driver = site.search(0, 1, start_new_session=True)
    began = time.monotonic()
    # A shell that closes and a service manager signal all of a group, Ray included.
    os.killpg(driver.pid, number)
    output = site.interrupted(driver, began)
    took = time.monotonic() - began
    assert f"topotune resume {NAME}" in output, f"no way on is shown: {output[-300:]}"
    assert site.status()["counts"].get("RUNNING") == 1, "no trial is left to go on with"
    site.run("resume", NAME)
    seen(f"gone after {took:.1f} s, exit code {INTERRUPTED}; {audit(site, kills=0)}")


@pytest.mark.faults_full
def test_stopped_in_a_long_epoch(site: Site, seen: Seen) -> None:
    """SIGINT while an epoch takes a minute: the epoch is cut short; every process gone within 20 s;
    the trial stays resumable."""
    driver, began = interrupted_in_a_minute(site, {"trials": 1, "epochs": 2})
    output = site.interrupted(driver, began)
    took = time.monotonic() - began
    assert f"topotune resume {NAME}" in output, f"no way on is shown: {output[-300:]}"
    assert set(site.states().values()) == {"RUNNING"}, f"states {site.states()}"
    site.run("resume", NAME)
    counted = audit(site, trials=1, kills=1)
    seen(f"gone after {took:.1f} s, exit code {INTERRUPTED}; resumed: {counted}")


@pytest.mark.faults
def test_second_sigint(site: Site, seen: Seen) -> None:
    """SIGINT twice, while an epoch takes a minute: aborts at once, sooner than a drain, which waits
    longer, could end; resumable."""
    driver, began = interrupted_in_a_minute(site, {"trials": 4, "epochs": 3})
    site.says(driver, "once more to abort", GONE_WITHIN)
    again = time.monotonic()
    driver.send(signal.SIGINT)
    text = driver.finish(INTERRUPTED, GONE_WITHIN - (again - began))
    aborted = time.monotonic() - again
    # Not by "aborted": a drain that takes too long says that too.
    assert "Not finished (" not in text, f"it drained: {text[-500:]}"
    assert aborted < DRAIN_SECONDS, f"ended {aborted:.1f} s after the second, as a drain would"
    site.all_gone(GONE_WITHIN - (time.monotonic() - began))
    site.run("resume", NAME)
    seen(f"ended {aborted:.1f} s after the second, code {INTERRUPTED}; {audit(site, kills=1)}")


@pytest.mark.faults_full
def test_terminal_closed(site: Site, seen: Seen) -> None:
    """The driver's terminal is closed: trials drain, all is saved, exit code 130, every process
    gone within 20 s; resumable."""
    ours, theirs = pty.openpty()

    def lead_a_session() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    file = site.search_file({"pause": 0.3})
    driver = site.start("search", file, preexec_fn=lead_a_session, **streams)
    os.close(theirs)
    os.set_blocking(ours, False)

    def read_on() -> bool:
        with suppress(OSError):
            os.read(ours, 1 << 16)  # or the terminal's buffer fills up and holds the writer
        return len(site.epochs(0)) >= 1

    site.wait(read_on, 120, "trial 0 has not reached epoch 1")
    began = time.monotonic()
    os.close(ours)
    site.interrupted(driver, began)
    took = time.monotonic() - began
    site.run("resume", NAME)
    seen(f"gone after {took:.1f} s, exit code {INTERRUPTED}; {audit(site, kills=0)}")


@pytest.mark.faults_full
def test_signals_at_start(site: Site, seen: Seen) -> None:
    """SIGINT, SIGTERM and SIGHUP at moments from the first import to the first epoch: no traceback,
    no process left, exit code 130."""
    took: list[float] = []
    file = site.search_file()
    for number, word, seconds in AT_START:
        driver = site.start("search", file, "--name", f"attempt-{len(took)}")
        site.says(driver, word, 120)
        time.sleep(seconds)
        began = time.monotonic()
        driver.send(number)
        site.interrupted(driver, began)
        took.append(time.monotonic() - began)
    seen(f"{len(took)} starts ended, each within {max(took):.1f} s; nothing left running")


@pytest.mark.faults_full
def test_driver_killed_ten_times(site: Site, seen: Seen) -> None:
    """Kill -9 of the driver at ten random moments of a search, each followed by a resume:
    completes; no finished epoch is repeated; equal to the undisturbed search."""
    chance = random.Random(1)
    file = site.search_file({"pause": 0.15}, budget={"trials": 6, "epochs": 6})
    driver = site.start("search", file)
    kills, most = 0, 0
    while kills < KILLS:
        site.wait((site.root / "search.json").exists, 60, "the search has no folder")
        if kills % 2:  # at work, else at any moment, which on a busy machine is the start
            begun = site.trained()
            site.wait(partial(moved_on, site, driver, begun), 120, "no epoch has begun")
            wait_or_end(driver, chance.uniform(0.0, 2.0))
        else:
            wait_or_end(driver, chance.uniform(4.0, 14.0))
        if driver.process.poll() is not None:
            break
        driver.kill()
        kills += 1
        most = max(most, sum(len(site.epochs(number)) for number in range(6)))
        driver = site.start("resume", NAME)
    driver.finish()
    assert kills == KILLS, f"only {kills} kills before the end: make the search longer"
    seen(f"{kills} kills, the last after {most} of 36 epochs; {audit(site, trials=6, kills=kills)}")


@pytest.mark.faults_full
@pytest.mark.parametrize("seconds", [60.0, 120.0], ids="{:.0f}s".format)
def test_suspended(site: Site, seen: Seen, seconds: float) -> None:
    """The whole search is suspended, longer than any limit on a stalled trial: no false alarm, no
    negative duration; equal to the undisturbed search; at most a minute of it is charged as
    work."""
    site.search_file({"pause": 0.3}, limits={"stall": STALL})
    driver = site.search(0, 1)
    tree = site.processes()
    for action in (psutil.Process.suspend, psutil.Process.resume):
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                action(process)
        if action is psutil.Process.suspend:
            time.sleep(seconds)
    output = driver.finish()
    died = "; ".join(line for line in output.splitlines() if "goes on from" in line)
    rows = site.status()["trials"]
    assert all(row["state"] == "COMPLETE" for row in rows), f"ends {site.states()}"
    epochs = [report.seconds for row in rows for report in site.epochs(row["number"])]
    assert min(epochs) >= 0, f"negative seconds of epochs: {epochs}"
    held = sum(seconds / 2 < length for length in epochs)
    assert held <= 1, f"the pause is in {held} epochs: {epochs}"
    spent = [row["device_seconds"] for row in rows]
    assert min(spent) >= 0, f"negative device seconds: {spent}"
    counted = audit(site)
    extra = sum(spent) - sum(row["device_seconds"] for row in reference(site))
    bound = min(seconds, MAX_GAP) + SLACK
    assert extra < bound, f"{extra:.0f} device seconds more than undisturbed: {spent}"
    seen(f"{died or 'nothing was restarted'}; {extra:.0f} device seconds more; {counted}")


def interrupted_in_a_minute(site: Site, budget: dict[str, int]) -> tuple[Driver, float]:
    """A driver that got SIGINT in an epoch that outlasts a drain's patience, and when."""
    driver = site.start("search", site.search_file(budget=budget), env={PAUSE: str(MINUTE)})
    site.wait(lambda: site.trained() > 0, 120, "no epoch has begun")
    began = time.monotonic()
    driver.send(signal.SIGINT)
    return driver, began


def moved_on(site: Site, driver: Driver, begun: int) -> bool:
    return site.trained() > begun or driver.process.poll() is not None


def wait_or_end(driver: Driver, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        driver.process.wait(seconds)
