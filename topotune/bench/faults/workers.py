"""Faults of the processes that train, from outside and by what they run."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from topotune.bench.faults.invariants import audit
from topotune.bench.faults.rogue import IMPORT_PATH, PRINTED
from topotune.bench.faults.scenario import Scenario, expect
from topotune.bench.faults.site import NAME, Driver, Site
from topotune.search.place.output import OUTPUT_FILE

RESUMES_WITHIN = 15.0
"""Seconds from the kill of a worker to the next epoch of its trial."""
STALL = 40.0
"""Seconds of ``limits.stall``; more than a worker takes to load its libraries on a busy machine."""
_ROOM, _LEAST_ROOM = 5e9, 3.5e9
"""Bytes that the machine may hold more before Ray ends a worker: as wanted, and at least. The
search itself takes half."""
PRINT_BOUND = 32 * 2**20
"""Bytes that a trial's output and all logs may take where it prints ``PRINTED`` characters."""


def kill_worker(site: Site, driver: Driver, trial: int) -> tuple[int, float]:
    """Kill -9 the worker of a running trial; epochs it had, and seconds until it has one more."""
    workers = driver.workers()
    expect(bool(workers), "no worker is running")
    for worker in workers:
        worker.kill()
    psutil.wait_procs(workers, timeout=10)
    known = len(site.epochs(trial))  # what it wrote up to its end is not what came after it
    return known, site.reach(driver, trial, known + 1)


def _killed_once(site: Site) -> str:
    budget = {"trials": 2, "epochs": 6}
    driver = site.start("search", site.search_file({"pause": 0.2}, budget=budget))
    site.reach(driver, 0, 2)
    known, seconds = kill_worker(site, driver, 0)
    driver.finish()
    expect(seconds < RESUMES_WITHIN, f"the next epoch came after {seconds:.1f} s")
    return f"epoch {known + 1} came {seconds:.1f} s after the kill; {audit(site, 2, kills=1)}"


def _killed_for_good(site: Site) -> str:
    """One kill, a stop and resume, another kill: the count goes on over sessions."""
    budget = {"trials": 2, "epochs": 9, "max_failures": 1}
    driver = site.start("search", site.search_file({"pause": 0.2}, budget=budget))
    site.reach(driver, 0, 1)
    kill_worker(site, driver, 0)
    driver.process.kill()
    driver.process.wait()
    site.wait(lambda: not site.processes(), 60, "processes are left")  # or they train on
    known = len(site.epochs(0))
    driver = site.start("resume", NAME)
    site.reach(driver, 0, known + 1)
    workers = driver.workers()
    expect(bool(workers), "no worker is running")
    for worker in workers:
        worker.kill()
    driver.finish()
    row = _row(site, 0)
    expect(row["state"] == "FAILED", f"trial 0 is {row['state']}: {row['reason']}")
    expect("2 times" in row["reason"], f"reason: {row['reason']}")
    expect(row["epochs"] >= known, f"{row['epochs']} epochs are kept of {known}")
    return f"{row['reason']}; {audit(site, 2, undisturbed=False, kills=3)}"


def _rogue_file(site: Site, *faults: str, **changes: Any) -> None:
    """A search whose first trials misbehave, one in each of these ways, and whose others do not."""
    points = [{"lr": 0.01, "task.fault": fault} for fault in (*faults, "", "")]
    blocks: dict[str, Any] = {
        "space": {
            "lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
            "task.fault": {"type": "categorical", "choices": ["", *faults]},
        },
        "task": {"name": IMPORT_PATH, "options": {"pause": 0.05}},
        "warm_start": points,
        "budget": {"trials": len(points), "epochs": 3, "max_failures": 1},
        **changes,
    }
    site.search_file(**blocks)


def _user_errors(site: Site) -> str:
    _rogue_file(site, "raise", "exit", "interrupt")
    output = site.run("search", site.folder / f"{NAME}.yaml")
    expect("goes on from its last epoch" not in output, f"something was retried: {output}")
    reasons = _ends(site, "the user's code is broken", "SystemExit: 3", "KeyboardInterrupt")
    return f"{reasons}; {audit(site, trials=5, undisturbed=False)}"


def _abort(site: Site) -> str:
    _rogue_file(site, "abort")
    site.run("search", site.folder / f"{NAME}.yaml")
    reasons = _ends(site, "SIGABRT in rogue.py")
    expect("2 times" in reasons, f"retried once, then given up: {reasons}")
    return f"{reasons}; {audit(site, trials=3, undisturbed=False)}"


def _watchdog(site: Site) -> str:
    _rogue_file(site, "hang", "leak", limits={"stall": STALL, "memory": "1.5GB"})
    output = site.run("search", site.folder / f"{NAME}.yaml")
    expect("goes on from its last epoch" not in output, f"something was retried: {output}")
    reasons = _ends(site, "no progress for longer than limits.stall", "too much memory")
    expect(reasons.count("rogue.py") == 2, f"the place is not named: {reasons}")
    return f"{reasons}; {audit(site, trials=4, undisturbed=False)}"


def _node_full(site: Site) -> str:
    """Ray's own monitor, told that the machine is full a little above what it holds now."""
    memory = psutil.virtual_memory()
    room = min(_ROOM, 0.7 * memory.available)
    expect(room > _LEAST_ROOM, f"needs {_LEAST_ROOM / 0.7e9:.0f} GB of memory that nobody uses")
    share = (memory.total - memory.available + room) / memory.total
    budget = {"trials": 3, "epochs": 3, "max_out_of_memory": 1}
    _rogue_file(site, "leak", budget=budget, limits={"memory": None})
    monitor = {
        "RAY_memory_usage_threshold": f"{share:.4f}",
        "RAY_memory_monitor_refresh_ms": "50",
    }
    driver = site.start("search", site.folder / f"{NAME}.yaml", env=monitor)
    output = driver.finish()
    expect("goes on from its last epoch" in output, f"nothing was retried: {output[-800:]}")
    reasons = _ends(site, "its node ran out of memory 2 times (last: Ray ended it")
    return f"{reasons}; {audit(site, trials=3, undisturbed=False)}"


def _frozen(site: Site) -> str:
    budget = {"trials": 2, "epochs": 6}
    file = site.search_file({"pause": 0.3}, budget=budget, limits={"stall": STALL})
    driver = site.start("search", file)
    site.reach(driver, 0, 1)
    workers = driver.workers()
    expect(bool(workers), "no worker is running")
    for worker in workers:
        worker.suspend()
    driver.finish()
    reasons = _ends(site, "its process frozen")
    return f"{reasons}; {audit(site, 2, undisturbed=False)}"


def _left_behind(site: Site) -> str:
    """A trial that forks and one that prints; then a worker with children is killed."""
    budget = {"trials": 4, "epochs": 6}
    _rogue_file(
        site, "print", "fork", task={"name": IMPORT_PATH, "options": {"pause": 0.2}}, budget=budget
    )
    driver = site.start("search", site.folder / f"{NAME}.yaml")
    site.reach(driver, 0, 2)
    kept = _size(site.results / NAME / "trials" / "0000" / OUTPUT_FILE)
    logs = _log_bytes(driver) + kept
    expect(kept > 0, "what a trial printed is not in its folder")
    expect(logs < PRINT_BOUND, f"{PRINTED / 1e6:.0f} MB printed, logs of {logs / 1e6:.0f} MB")
    site.reach(driver, 1, 2)
    (worker,) = driver.workers()
    born = len(worker.children(recursive=True))
    expect(born == 3, f"the trial started {born} processes of 3")
    site.reach(driver, 2, 1)
    left = worker.children(recursive=True)
    expect(not left, f"left by the trial that has ended: {left}")
    driver.finish()
    site.all_gone()
    states = site.states()
    expect(set(states.values()) == {"COMPLETE"}, f"states {states}")
    return f"logs of {logs / 1e6:.1f} MB; 3 processes ended; {audit(site, 4, undisturbed=False)}"


def _orphans(site: Site) -> str:
    budget = {"trials": 3, "epochs": 6}
    _rogue_file(site, "fork", task={"name": IMPORT_PATH, "options": {"pause": 0.3}}, budget=budget)
    driver = site.start("search", site.folder / f"{NAME}.yaml")
    site.reach(driver, 0, 2)
    (worker,) = driver.workers()
    born = worker.children(recursive=True)
    worker.suspend()  # frozen: it can do nothing about its own end
    driver.process.kill()
    driver.process.wait()
    began = time.monotonic()
    site.all_gone()
    seconds = time.monotonic() - began
    expect(len(born) == 3, f"the trial started {len(born)} processes of 3")
    site.run("resume", NAME)
    return f"all gone after {seconds:.1f} s; {audit(site, 3, undisturbed=False)}"


def _row(site: Site, number: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = site.status()["trials"]
    return next(row for row in rows if row["number"] == number)


def _ends(site: Site, *words: str) -> str:
    """The first trials FAILED with these words in their reasons, all others are COMPLETE."""
    rows = {row["number"]: row for row in site.status()["trials"]}
    for number, row in sorted(rows.items()):
        wanted = "FAILED" if number < len(words) else "COMPLETE"
        expect(row["state"] == wanted, f"trial {number} is {row['state']}: {row['reason']}")
        if number < len(words):
            expect(words[number] in row["reason"], f"trial {number}: {row['reason']}")
    return "; ".join(rows[number]["reason"].partition(" (trace")[0] for number in range(len(words)))


def _log_bytes(driver: Driver) -> int:
    """Bytes of all logs of the driver's own Ray."""
    for child in psutil.Process(driver.pid).children():
        with suppress(psutil.NoSuchProcess):
            for argument in child.cmdline():
                if argument.startswith("--log_dir="):
                    return sum(map(_size, Path(argument.removeprefix("--log_dir=")).rglob("*")))
    expect(False, "Ray's folder of logs is not found")
    return 0


def _size(path: Path) -> int:
    """Bytes of a file; none of one that Ray has renamed meanwhile."""
    with suppress(FileNotFoundError):
        return path.stat().st_size if path.is_file() else 0
    return 0


WORKERS = (
    Scenario(
        "worker-killed",
        "kill -9 of a trial's worker",
        f"its trial goes on from its last epoch within {RESUMES_WITHIN:.0f} s",
        _killed_once,
    ),
    Scenario(
        "worker-killed-for-good",
        "kill -9 of a trial's worker, twice, in two sessions, with budget.max_failures: 1",
        "FAILED with the cause and the count, which a resume goes on with; the search goes on",
        _killed_for_good,
        seconds=50,
    ),
    Scenario(
        "user-errors",
        "trials that raise an exception, SystemExit and KeyboardInterrupt",
        "each FAILED with its cause, none retried; the search goes on",
        _user_errors,
    ),
    Scenario(
        "abort",
        "a trial that ends in a C-level abort, each time",
        "restarted within its budget, then FAILED with signal and line; the search goes on",
        _abort,
    ),
    Scenario(
        "hang-and-leak",
        "a trial that hangs and one that takes ever more memory",
        "the watchdog ends them: FAILED with cause and line, not retried; the search goes on",
        _watchdog,
        seconds=70,
    ),
    Scenario(
        "node-out-of-memory",
        "Ray's memory monitor ends the worker of a trial that fills its node, each time",
        "retried within budget.max_out_of_memory, then FAILED with the cause; the search goes on",
        _node_full,
        alone=True,
    ),
    Scenario(
        "worker-frozen",
        "a trial's worker is frozen (SIGSTOP)",
        "the driver ends it: FAILED with its cause; the search goes on",
        _frozen,
        seconds=90,
    ),
    Scenario(
        "print-and-fork",
        f"a trial that prints {PRINTED // 10**6} MB and one that leaves processes behind",
        f"logs below {PRINT_BOUND // 2**20} MiB; the processes end with their trial",
        _left_behind,
    ),
    Scenario(
        "driver-killed-with-orphans",
        "kill -9 of the driver of a frozen worker that has started detached processes",
        "every process of the search is gone within 15 s; a resume completes it",
        _orphans,
        seconds=50,
    ),
)
