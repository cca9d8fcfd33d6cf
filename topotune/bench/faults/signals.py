"""Faults of the driver's surroundings: signals, a terminal that closes, a machine that sleeps."""

from __future__ import annotations

import os
import pty
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import psutil

from topotune.bench.faults.invariants import audit, reference
from topotune.bench.faults.scenario import Scenario, expect
from topotune.bench.faults.site import NAME, Driver, Site
from topotune.bench.faults.task import PAUSE
from topotune.bench.faults.workers import STALL
from topotune.search.ray.pulse import DRAIN_SECONDS
from topotune.search.study.ledger import MAX_GAP

GONE_WITHIN = 20.0
"""Seconds from the first signal until every process of the search is gone."""
INTERRUPTED = 130
_MINUTE = 12.0
"""Seconds a batch, so that an epoch takes a minute and cannot be waited for."""
_SLACK = 25.0
"""Device seconds that the same search may take longer, on a busy machine or by a restart."""


def _stop(site: Site, driver: Driver, hurt: Callable[[Driver], None]) -> float:
    """Stop a driver in some way; the seconds until nothing of it is left."""
    began = time.monotonic()
    hurt(driver)
    output = driver.finish(INTERRUPTED, seconds=GONE_WITHIN)
    site.all_gone(GONE_WITHIN - (time.monotonic() - began))
    seconds = time.monotonic() - began
    terminal = not output
    expect(terminal or f"topotune resume {NAME}" in output, f"no way on is shown: {output[-300:]}")
    return seconds


def _stopped_by(*numbers: signal.Signals) -> Callable[[Site], str]:
    def run(site: Site) -> str:
        def hurt(driver: Driver) -> None:
            for number in numbers:
                # A shell that closes and a service manager signal all of a group, Ray included.
                os.killpg(driver.pid, number)
                time.sleep(1.0)

        file = site.search_file({"pause": 0.3})
        driver = site.start("search", file, start_new_session=True)
        site.reach(driver, 0, 1)
        seconds = _stop(site, driver, hurt)
        expect(site.status()["counts"].get("RUNNING") == 1, "no trial is left to go on with")
        site.run("resume", NAME)
        return f"gone after {seconds:.1f} s, exit code {INTERRUPTED}; {audit(site, kills=0)}"

    return run


def _second_signal(site: Site) -> str:
    """In an epoch that outlasts a drain's patience, so that no drain could end as soon."""
    driver = site.start("search", site.search_file(), env={PAUSE: str(_MINUTE)})
    site.wait(lambda: site.trained() > 0, 120, "no epoch has begun")
    began = time.monotonic()
    driver.send(signal.SIGINT)
    site.wait(partial(_says, driver, "once more to abort"), GONE_WITHIN, "the first is not heard")
    again = time.monotonic()
    driver.send(signal.SIGINT)
    text = driver.finish(INTERRUPTED, GONE_WITHIN - (again - began))
    aborted = time.monotonic() - again
    # Not by "aborted": a drain that takes too long says that too.
    expect("Not finished (" not in text, f"it drained: {text[-500:]}")
    expect(aborted < DRAIN_SECONDS, f"ended {aborted:.1f} s after the second, as a drain would")
    site.all_gone(GONE_WITHIN - (time.monotonic() - began))
    site.run("resume", NAME)
    return f"ended {aborted:.1f} s after the second, code {INTERRUPTED}; {audit(site, kills=1)}"


def _long_epoch(site: Site) -> str:
    budget = {"trials": 1, "epochs": 2}
    file = site.search_file(budget=budget)
    driver = site.start("search", file, env={PAUSE: str(_MINUTE)})
    site.wait(lambda: site.trained() > 0, 120, "no epoch has begun")
    seconds = _stop(site, driver, lambda driver: driver.send(signal.SIGINT))
    expect(set(site.states().values()) == {"RUNNING"}, f"states {site.states()}")
    site.run("resume", NAME)
    seen = audit(site, trials=1, kills=1)
    return f"gone after {seconds:.1f} s, exit code {INTERRUPTED}; resumed: {seen}"


def _terminal_closed(site: Site) -> str:
    ours, theirs = pty.openpty()

    def lead_a_session() -> None:
        os.setsid()
        import fcntl
        import termios

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
    seconds = _stop(site, driver, lambda driver: os.close(ours))
    site.run("resume", NAME)
    return f"gone after {seconds:.1f} s, exit code {INTERRUPTED}; {audit(site, kills=0)}"


_AT_START = (
    (signal.SIGINT, "checking", 0.0),
    (signal.SIGTERM, "starting Ray", 0.3),
    (signal.SIGHUP, "starting Ray", 1.5),
    (signal.SIGTERM, "starting Ray", 3.0),
    (signal.SIGINT, "starting Ray", 0.3),
)
"""Signal, what the command has said by then, and seconds after that."""


def _says(driver: Driver, word: str) -> bool:
    return word in driver.output()


def _start_up(site: Site) -> str:
    """A signal at moments from the first import to the first epoch."""
    took: list[float] = []
    file = site.search_file()
    for number, word, seconds in _AT_START:
        driver = site.start("search", file, "--name", f"attempt-{len(took)}")
        site.wait(partial(_says, driver, word), 120, f"{word!r} is not said")
        time.sleep(seconds)
        began = time.monotonic()
        driver.send(number)
        driver.finish(INTERRUPTED, GONE_WITHIN)
        site.all_gone(GONE_WITHIN - (time.monotonic() - began))
        took.append(time.monotonic() - began)
    return f"{len(took)} starts ended, each within {max(took):.1f} s; nothing left running"


def _killed_ten_times(site: Site) -> str:
    chance = random.Random(1)
    budget = {"trials": 6, "epochs": 6}
    driver = site.start("search", site.search_file({"pause": 0.15}, budget=budget))
    kills, most = 0, 0
    while kills < 10:
        site.wait(lambda: _exists(site), 60, "the search has no folder")
        if kills % 2:  # at work, else at any moment, which on a busy machine is the start
            begun = site.trained()
            site.wait(partial(_moved_on, site, driver, begun), 120, "no epoch has begun")
            _wait_or_end(driver, chance.uniform(0.0, 2.0))
        else:
            _wait_or_end(driver, chance.uniform(4.0, 14.0))
        if driver.process.poll() is not None:
            break
        driver.process.kill()
        driver.process.wait()
        kills += 1
        most = max(most, sum(len(site.epochs(number)) for number in range(6)))
        driver = site.start("resume", NAME)
    driver.finish()
    expect(kills == 10, f"only {kills} kills before the end: make the search longer")
    return (
        f"{kills} kills, the last after {most} of 36 epochs; {audit(site, trials=6, kills=kills)}"
    )


def _moved_on(site: Site, driver: Driver, begun: int) -> bool:
    return site.trained() > begun or driver.process.poll() is not None


def _exists(site: Site) -> bool:
    return (site.results / NAME / "search.json").exists()


def _wait_or_end(driver: Driver, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and driver.process.poll() is None:
        time.sleep(0.05)


def _suspended(seconds: float) -> Callable[[Site], str]:
    def run(site: Site) -> str:
        driver = site.start("search", site.search_file({"pause": 0.3}, limits={"stall": STALL}))
        site.reach(driver, 0, 1)
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
        expect(all(row["state"] == "COMPLETE" for row in rows), f"ends {site.states()}")
        epochs = [report.seconds for row in rows for report in site.epochs(row["number"])]
        expect(min(epochs) >= 0, f"negative seconds of epochs: {epochs}")
        held = sum(seconds / 2 < length for length in epochs)
        expect(held <= 1, f"the pause is in {held} epochs: {epochs}")
        spent = [row["device_seconds"] for row in rows]
        expect(min(spent) >= 0, f"negative device seconds: {spent}")
        seen = audit(site)
        extra = sum(spent) - sum(row["device_seconds"] for row in reference(site))
        bound = min(seconds, MAX_GAP) + _SLACK
        expect(extra < bound, f"{extra:.0f} device seconds more than undisturbed: {spent}")
        return f"{died or 'nothing was restarted'}; {extra:.0f} device seconds more; {seen}"

    return run


_STOPS = "trials drain, all is saved, exit code 130, every process gone within 20 s; resumable"

SIGNALS = (
    *(
        Scenario(
            f"stopped-by-{number.name.lower()}",
            f"{number.name} to the driver",
            _STOPS,
            _stopped_by(number),
        )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ),
    Scenario(
        "stopped-in-a-long-epoch",
        "SIGINT while an epoch takes a minute",
        "the epoch is cut short; every process gone within 20 s; the trial stays resumable",
        _long_epoch,
    ),
    Scenario(
        "second-sigint",
        "SIGINT twice, while an epoch takes a minute",
        f"aborts at once, sooner than the {DRAIN_SECONDS:.0f} s that a drain waits; resumable",
        _second_signal,
    ),
    Scenario("terminal-closed", "the driver's terminal is closed", _STOPS, _terminal_closed),
    Scenario(
        "signals-at-start",
        "SIGINT, SIGTERM and SIGHUP while the command starts",
        "no traceback, no process left, exit code 130",
        _start_up,
        seconds=40,
    ),
    Scenario(
        "driver-killed-ten-times",
        "kill -9 of the driver at ten random moments of a search, each followed by a resume",
        "completes; no finished epoch is repeated; equal to the undisturbed search",
        _killed_ten_times,
        seconds=200,
    ),
    Scenario(
        "suspended",
        "the whole search is suspended for 60 s, longer than any limit on a stalled trial",
        "no false alarm, no negative duration; equal to the undisturbed search",
        _suspended(60.0),
        seconds=95,
    ),
    Scenario(
        "suspended-for-minutes",
        "the whole search is suspended for 120 s",
        f"as before; no more than {MAX_GAP:.0f} s of it are charged as work",
        _suspended(120.0),
        seconds=155,
    ),
)
