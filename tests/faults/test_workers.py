"""Faults of the processes that train, from outside and by what they run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.invariants import audit
from tests.faults.rogue import IMPORT_PATH, PRINTED
from tests.faults.site import NAME, STALL, Driver, Seen, Site
from topotune.search.place.output import OUTPUT_FILE

RESUMES_WITHIN = 15.0
"""Seconds from the kill of a worker to the next epoch of its trial."""
ROOM, LEAST_ROOM = 5e9, 3.5e9
"""Bytes that the machine may hold more before Ray ends a worker: as wanted, and at least. The
search itself takes half."""
PRINT_BOUND = 32 * 2**20
"""Bytes that a trial's output and all logs may take where it prints ``PRINTED`` characters."""
RETRIED = "goes on from its last epoch"


@pytest.mark.faults
def test_worker_killed(site: Site, seen: Seen) -> None:
    """Kill -9 of a trial's worker: its trial goes on from its last epoch within 15 s."""
    site.search_file({"pause": 0.2}, budget={"trials": 2, "epochs": 6})
    driver = site.search(0, 2)
    workers = kill_workers(driver)
    psutil.wait_procs(workers, timeout=10)
    known = len(site.epochs(0))  # what it wrote up to its end is not what came after it
    seconds = site.reach(driver, 0, known + 1)
    driver.finish()
    assert seconds < RESUMES_WITHIN, f"the next epoch came after {seconds:.1f} s"
    seen(f"epoch {known + 1} came {seconds:.1f} s after the kill; {audit(site, 2, kills=1)}")


@pytest.mark.faults_full
def test_worker_killed_for_good(site: Site, seen: Seen) -> None:
    """Kill -9 of a trial's worker, twice, in two sessions, with budget.max_failures 1: FAILED with
    the cause and the count, which a resume goes on with; the search goes on."""
    site.search_file({"pause": 0.2}, budget={"trials": 2, "epochs": 9, "max_failures": 1})
    driver = site.search(0, 1)
    workers = kill_workers(driver)
    psutil.wait_procs(workers, timeout=10)
    site.reach(driver, 0, len(site.epochs(0)) + 1)
    site.killed(driver)
    known = len(site.epochs(0))
    driver = site.start("resume", NAME)
    site.reach(driver, 0, known + 1)
    kill_workers(driver)
    driver.finish()
    row = site.rows()[0]
    assert row["state"] == "FAILED", f"trial 0 is {row['state']}: {row['reason']}"
    assert "2 times" in row["reason"], f"reason: {row['reason']}"
    assert row["epochs"] >= known, f"{row['epochs']} epochs are kept of {known}"
    seen(f"{row['reason']}; {audit(site, 2, undisturbed=False, kills=3)}")


@pytest.mark.faults
def test_user_errors(site: Site, seen: Seen) -> None:
    """Trials that raise an exception, SystemExit and KeyboardInterrupt: each FAILED with its cause,
    none retried; the search goes on."""
    output = site.run("search", rogue_file(site, "raise", "exit", "interrupt"))
    assert RETRIED not in output, f"something was retried: {output}"
    reasons = ends(site, "the user's code is broken", "SystemExit: 3", "KeyboardInterrupt")
    seen(f"{reasons}; {audit(site, trials=5, undisturbed=False)}")


@pytest.mark.faults_full
def test_abort(site: Site, seen: Seen) -> None:
    """A trial that ends in a C-level abort, each time: restarted within its budget, then FAILED
    with signal and line; the search goes on."""
    site.run("search", rogue_file(site, "abort"))
    reasons = ends(site, "SIGABRT in rogue.py")
    assert "2 times" in reasons, f"retried once, then given up: {reasons}"
    seen(f"{reasons}; {audit(site, trials=3, undisturbed=False)}")


@pytest.mark.faults_full
def test_hang_and_leak(site: Site, seen: Seen) -> None:
    """A trial that hangs and one that takes ever more memory: the watchdog ends them, FAILED with
    cause and line, not retried; the search goes on."""
    limits = {"stall": STALL, "memory": "1.5GB"}
    output = site.run("search", rogue_file(site, "hang", "leak", limits=limits))
    assert RETRIED not in output, f"something was retried: {output}"
    reasons = ends(site, "no progress for longer than limits.stall", "too much memory")
    assert reasons.count("rogue.py") == 2, f"the place is not named: {reasons}"
    seen(f"{reasons}; {audit(site, trials=4, undisturbed=False)}")


@pytest.mark.faults_full
@pytest.mark.alone
def test_node_out_of_memory(site: Site, seen: Seen) -> None:
    """Ray's memory monitor ends the worker of a trial that fills its node, each time: retried
    within budget.max_out_of_memory, then FAILED with the cause; the search goes on."""
    memory = psutil.virtual_memory()
    room = min(ROOM, 0.7 * memory.available)
    assert room > LEAST_ROOM, f"needs {LEAST_ROOM / 0.7e9:.0f} GB of unused memory"
    # For the monitor the machine is full a little above what it holds now.
    share = (memory.total - memory.available + room) / memory.total
    monitor = {
        "RAY_memory_usage_threshold": f"{share:.4f}",
        "RAY_memory_monitor_refresh_ms": "50",
    }
    budget = {"trials": 3, "epochs": 3, "max_out_of_memory": 1}
    file = rogue_file(site, "leak", budget=budget, limits={"memory": None})
    output = site.start("search", file, env=monitor).finish()
    assert RETRIED in output, f"nothing was retried: {output[-800:]}"
    reasons = ends(site, "its node ran out of memory 2 times (last: Ray ended it")
    seen(f"{reasons}; {audit(site, trials=3, undisturbed=False)}")


@pytest.mark.faults_full
def test_worker_frozen(site: Site, seen: Seen) -> None:
    """A trial's worker is frozen (SIGSTOP): the driver ends it, FAILED with its cause; the search
    goes on."""
    budget = {"trials": 2, "epochs": 6}
    site.search_file({"pause": 0.3}, budget=budget, limits={"stall": STALL})
    driver = site.search(0, 1)
    for worker in driver.workers():
        worker.suspend()
    driver.finish()
    reasons = ends(site, "its process frozen")
    seen(f"{reasons}; {audit(site, 2, undisturbed=False)}")


@pytest.mark.faults
def test_print_and_fork(site: Site, seen: Seen) -> None:
    """A trial that prints 50 MB and one that leaves processes behind: logs below 32 MiB; the
    processes end with their trial."""
    budget = {"trials": 4, "epochs": 6}
    rogue_file(site, "print", "fork", pause=0.2, budget=budget)
    driver = site.search(0, 2)
    kept = size(site.root / "trials" / "0000" / OUTPUT_FILE)
    logs = log_bytes(driver) + kept
    assert kept > 0, "what a trial printed is not in its folder"
    assert logs < PRINT_BOUND, f"{PRINTED / 1e6:.0f} MB printed, logs of {logs / 1e6:.0f} MB"
    site.reach(driver, 1, 2)
    (worker,) = driver.workers()
    born = len(worker.children(recursive=True))
    assert born == 3, f"the trial started {born} processes of 3"
    site.reach(driver, 2, 1)
    left = worker.children(recursive=True)
    assert not left, f"left by the trial that has ended: {left}"
    driver.finish()
    site.all_gone()
    states = site.states()
    assert set(states.values()) == {"COMPLETE"}, f"states {states}"
    seen(f"logs of {logs / 1e6:.1f} MB; 3 processes ended; {audit(site, 4, undisturbed=False)}")


@pytest.mark.faults
def test_driver_killed_with_orphans(site: Site, seen: Seen) -> None:
    """Kill -9 of the driver of a frozen worker that has started detached processes: every process
    of the search is gone within 15 s; a resume completes it."""
    rogue_file(site, "fork", pause=0.3, budget={"trials": 3, "epochs": 6})
    driver = site.search(0, 2)
    (worker,) = driver.workers()
    born = worker.children(recursive=True)
    worker.suspend()  # frozen: it can do nothing about its own end
    driver.kill()
    seconds = site.all_gone(15)
    assert len(born) == 3, f"the trial started {len(born)} processes of 3"
    site.run("resume", NAME)
    seen(f"all gone after {seconds:.1f} s; {audit(site, 3, undisturbed=False)}")


def kill_workers(driver: Driver) -> list[psutil.Process]:
    """Kill -9 the processes that train."""
    workers = driver.workers()
    for worker in workers:
        worker.kill()
    return workers


def rogue_file(site: Site, *faults: str, pause: float = 0.05, **changes: Any) -> Path:
    """A search whose first trials misbehave, one in each of these ways, and whose others do not."""
    points = [{"lr": 0.01, "task.fault": fault} for fault in (*faults, "", "")]
    blocks: dict[str, Any] = {
        "space": {
            "lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
            "task.fault": {"type": "categorical", "choices": ["", *faults]},
        },
        "task": {"name": IMPORT_PATH, "options": {"pause": pause}},
        "warm_start": points,
        "budget": {"trials": len(points), "epochs": 3, "max_failures": 1},
        **changes,
    }
    return site.search_file(**blocks)


def ends(site: Site, *words: str) -> str:
    """The first trials FAILED with these words in their reasons, all others are COMPLETE."""
    rows = site.rows()
    for number, row in sorted(rows.items()):
        wanted = "FAILED" if number < len(words) else "COMPLETE"
        assert row["state"] == wanted, f"trial {number} is {row['state']}: {row['reason']}"
        if number < len(words):
            assert words[number] in row["reason"], f"trial {number}: {row['reason']}"
    return "; ".join(rows[number]["reason"].partition(" (trace")[0] for number in range(len(words)))


def log_bytes(driver: Driver) -> int:
    """Bytes of all logs of the driver's own Ray."""
    for child in psutil.Process(driver.pid).children():
        with suppress(psutil.NoSuchProcess):
            for argument in child.cmdline():
                if argument.startswith("--log_dir="):
                    return sum(map(size, Path(argument.removeprefix("--log_dir=")).rglob("*")))
    raise AssertionError("Ray's folder of logs is not found")


def size(path: Path) -> int:
    """Bytes of a file; none of one that Ray has renamed meanwhile."""
    with suppress(FileNotFoundError):
        return path.stat().st_size if path.is_file() else 0
    return 0
