"""Faults of the driver: killed, stopped, or not alone."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from topotune.bench.faults.invariants import audit
from topotune.bench.faults.scenario import Scenario, expect
from topotune.bench.faults.site import NAME, Driver, Site
from topotune.bench.faults.task import PAUSE


def _second_driver(site: Site) -> str:
    # At a pace that leaves it half a minute, which is what the second one takes to be refused.
    first = site.start("search", site.search_file(), env={PAUSE: "0.5"})
    site.reach(first, 0, 1)
    refused = site.run("resume", NAME, code=2, seconds=60)
    expect(f"pid {first.pid}" in refused, f"the holder is not named: {refused}")
    first.finish()
    return f"refused: {refused.strip()[-120:]}; {audit(site)}"


def _foreign(site: Site, beat: int) -> None:
    """Write the lease as a driver on another machine would."""
    holder = {"pid": 41, "host": "elsewhere", "machine": "other", "token": "theirs", "beat": beat}
    # In one piece and in place, as the lease itself is written.
    with site.search.lock.open("r+", encoding="utf-8") as file:
        file.write(json.dumps(holder).ljust(511) + "\n")


def _foreign_lease(site: Site) -> str:
    """First of a driver that lives, then of one that has died."""
    driver = site.start("search", site.search_file())
    site.reach(driver, 0, 1)
    driver.send(signal.SIGKILL)
    driver.wait(30)
    site.wait(lambda: not site.processes(), 60, "processes are left")
    _foreign(site, 0)
    refused = site.start("resume", NAME)
    began = time.monotonic()
    while refused.process.poll() is None:
        expect(time.monotonic() - began < 60, f"not refused: {refused.output()[-500:]}")
        time.sleep(1)
        _foreign(site, int(time.monotonic() - began))
    text = " ".join(refused.finish(2).split())
    expect("driven by pid 41 on elsewhere" in text, f"the holder is not named: {text}")
    text = " ".join(site.run("resume", NAME).split())
    expect("the lease of pid 41 on elsewhere is dead; taking over" in text, f"not said: {text}")
    return f"the living one respected, the dead one replaced; {audit(site)}"


def _fenced(site: Site) -> str:
    """Suspended for so long that a driver on another machine took over."""
    driver = site.start("search", site.search_file(), env={PAUSE: "0.8"})
    site.reach(driver, 0, 1)
    _suspend(site, driver)
    _foreign(site, 7)
    kept = _records(site)
    time.sleep(3)  # another machine's would have watched for 30
    driver.send(signal.SIGCONT)
    text = " ".join(driver.finish(1, 60).split())
    expect("taken over by pid 41 on elsewhere" in text, f"not said: {text[-500:]}")
    site.all_gone()
    left = _records(site)
    changed = sorted(name for name in kept | left if kept.get(name) != left.get(name))
    expect(not changed, f"written after it was replaced: {changed}")
    site.search.lock.write_text("", encoding="utf-8")  # the other one has ended
    site.run("resume", NAME)
    return f"stopped, {len(kept)} records as they were; {audit(site, kills=1)}"


def _suspend(site: Site, driver: Driver) -> None:
    """Stop the driver while it waits for a worker: a write that it is at would be finished later.

    The ledger, which is written once a second, is the last that it does about a worker's news.
    """
    ledger = site.search.ledger
    for _ in range(10):
        site.wait(partial(_written_since, ledger, time.time_ns()), 60, "no ledger is written")
        time.sleep(0.2)
        driver.send(signal.SIGSTOP)
        site.wait(lambda: _halted(driver.pid), 60, "the driver is not suspended")
        if not any(ledger.parent.glob("*.partial")):
            return
        driver.send(signal.SIGCONT)
    expect(False, "the driver was met writing, time and again")


def _halted(pid: int) -> bool:
    """Whether every thread of a process is stopped; one that syncs a file still is not."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(text.rpartition(")")[2].split()[0] in "Tt" for text in stats)


def _written_since(path: Path, then: int) -> bool:
    with suppress(FileNotFoundError):  # just being replaced
        return path.stat().st_mtime_ns > then
    return False


def _records(site: Site) -> dict[str, bytes]:
    """All that a driver alone may write.

    Not what a trial's worker writes into its folder, which its own next driver finds there
    finished; and not what has been sent to MLflow, which any process may send, once.
    """
    root = site.search.root
    paths = (*root.iterdir(), *root.glob("trials/*/trial*.jsonl"))
    kept = {str(path.relative_to(root)): path.read_bytes() for path in paths if _drivers(path)}
    with closing(sqlite3.connect(root / "study.db", timeout=30)) as study:
        return kept | {"study.db": "\n".join(study.iterdump()).encode()}


def _drivers(path: Path) -> bool:
    sent = path.name.startswith(("shipped.", ".shipper", "refused."))
    return path.is_file() and not sent and not path.name.startswith("study.db")


DRIVERS = (
    Scenario(
        "second-driver",
        "a second driver on the same search",
        "refused at once, naming host and pid; the first goes on",
        _second_driver,
    ),
    Scenario(
        "lease-elsewhere",
        "lease of a driver on another machine, which lives; then which has died",
        "refused, naming host and pid; taken over after 30 s without a sign of life",
        _foreign_lease,
        75,
    ),
    Scenario(
        "driver-fenced",
        "driver suspended until another machine's has taken over",
        "stops at once, says so; study, ledger and every other record of a driver stay untouched",
        _fenced,
        40,
    ),
)
