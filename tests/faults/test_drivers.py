"""Faults of the driver: killed, stopped, or not alone."""

from __future__ import annotations

import json
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.faults.invariants import audit
from tests.faults.site import NAME, Driver, Seen, Site
from tests.faults.task import PAUSE
from topotune.search.place.folder import STUDY_COPY


@pytest.mark.faults
def test_second_driver(site: Site, seen: Seen) -> None:
    """A second driver on the same search: refused at once, naming host and pid; the first goes
    on."""
    # At a pace that leaves it half a minute, which is what the second one takes to be refused.
    first = site.search(0, 1, env={PAUSE: "0.5"})
    refused = site.run("resume", NAME, code=2, seconds=60)
    assert f"pid {first.pid}" in refused, f"the holder is not named: {refused}"
    first.finish()
    seen(f"refused: {refused.strip()[-120:]}; {audit(site)}")


@pytest.mark.faults_full
def test_lease_elsewhere(site: Site, seen: Seen) -> None:
    """Lease of a driver on another machine, which lives; then which has died: refused, naming host
    and pid; taken over after 30 s without a sign of life."""
    site.killed(site.search(0, 1))
    lease_to_another(site, 0)
    refused = site.start("resume", NAME)
    began = time.monotonic()
    while refused.process.poll() is None:
        assert time.monotonic() - began < 60, f"not refused: {refused.output()[-500:]}"
        time.sleep(1)
        lease_to_another(site, int(time.monotonic() - began))
    text = " ".join(refused.finish(2).split())
    assert "driven by pid 41 on elsewhere" in text, f"the holder is not named: {text}"
    text = " ".join(site.run("resume", NAME).split())
    assert "the lease of pid 41 on elsewhere is dead; taking over" in text, f"not said: {text}"
    seen(f"the living one respected, the dead one replaced; {audit(site)}")


@pytest.mark.faults_full
def test_driver_fenced(site: Site, seen: Seen) -> None:
    """Driver suspended until another machine's has taken over: stops at once, says so; study,
    ledger and every other record of a driver stay untouched."""
    driver = site.search(0, 1, env={PAUSE: "0.8"})
    suspend(site, driver)
    lease_to_another(site, 7)
    kept = records(site)
    time.sleep(3)  # another machine's would have watched for 30
    driver.send(signal.SIGCONT)
    text = " ".join(driver.finish(1, 60).split())
    assert "taken over by pid 41 on elsewhere" in text, f"not said: {text[-500:]}"
    site.all_gone()
    left = records(site)
    changed = sorted(name for name in kept | left if kept.get(name) != left.get(name))
    assert not changed, f"written after it was replaced: {changed}"
    site.kept.lock.write_text("", encoding="utf-8")  # the other one has ended
    site.run("resume", NAME)
    seen(f"stopped, {len(kept)} records as they were; {audit(site, kills=1)}")


def lease_to_another(site: Site, beat: int) -> None:
    """Write the lease as a driver on another machine would."""
    holder = {"pid": 41, "host": "elsewhere", "machine": "other", "token": "theirs", "beat": beat}
    # In one piece and in place, as the lease itself is written.
    with site.kept.lock.open("r+", encoding="utf-8") as file:
        file.write(json.dumps(holder).ljust(511) + "\n")


def suspend(site: Site, driver: Driver) -> None:
    """Stop the driver while it waits for a worker: a write that it is at would be finished later.

    What is spent, which the study is told once a second, is the last that it does about a worker's
    news, and the study's copy the last that is written of it.
    """
    copy = site.root / STUDY_COPY
    for _ in range(10):
        site.wait(partial(written_since, copy, time.time_ns()), 60, "no study is written")
        time.sleep(0.2)
        driver.send(signal.SIGSTOP)
        site.wait(lambda: halted(driver.pid), 60, "the driver is not suspended")
        if not any(site.root.glob("*.partial")):
            return
        driver.send(signal.SIGCONT)
    raise AssertionError("the driver was met writing, time and again")


def halted(pid: int) -> bool:
    """Whether every thread of a process is stopped; one that syncs a file still is not."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(text.rpartition(")")[2].split()[0] in "Tt" for text in stats)


def written_since(path: Path, then: int) -> bool:
    with suppress(FileNotFoundError):  # just being replaced
        return path.stat().st_mtime_ns > then
    return False


def records(site: Site) -> dict[str, bytes]:
    """All that a driver alone may write.

    Not what a trial's worker writes into its folder, which its own next driver finds there
    finished; and not what has been sent to MLflow, which any process may send, once.
    """
    root = site.root
    return {path.name: path.read_bytes() for path in root.iterdir() if drivers(path)}


def drivers(path: Path) -> bool:
    sent = path.name.startswith(("shipped.", ".shipper", "refused."))
    return path.is_file() and not sent
