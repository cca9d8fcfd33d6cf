"""Faults of the driver: killed, stopped, or not alone."""

from __future__ import annotations

import json
import signal
import time

from topotune.bench.faults.invariants import audit
from topotune.bench.faults.scenario import Scenario, expect
from topotune.bench.faults.site import NAME, Site


def _second_driver(site: Site) -> str:
    file = site.search_file()
    first = site.start("search", file)
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
    driver = site.start("search", site.search_file())
    site.reach(driver, 1, 1)
    driver.send(signal.SIGSTOP)
    _foreign(site, 7)
    kept = {
        path: path.read_bytes()
        for name in ("ledger.json", "driver.spool.jsonl", "driver.lock", "search.json")
        if (path := site.search.root / name)
    }
    time.sleep(3)  # another machine's would have watched for 30
    driver.send(signal.SIGCONT)
    text = " ".join(driver.finish(1, 60).split())
    expect("taken over by pid 41 on elsewhere" in text, f"not said: {text[-500:]}")
    changed = [path.name for path, before in kept.items() if path.read_bytes() != before]
    expect(not changed, f"written after it was replaced: {changed}")
    site.all_gone()
    site.search.lock.write_text("", encoding="utf-8")  # the other one has ended
    site.run("resume", NAME)
    return f"stopped and wrote nothing; {audit(site)}"


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
        "stops at once, says so, writes nothing more",
        _fenced,
        40,
    ),
)
