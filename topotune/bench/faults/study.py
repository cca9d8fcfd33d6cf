"""Faults of what a search is kept in: its study, its ledger, its checkpoints and outbox."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from topotune.bench.faults.invariants import audit
from topotune.bench.faults.postgres import Postgres
from topotune.bench.faults.scenario import Scenario, expect
from topotune.bench.faults.signals import GONE_WITHIN, INTERRUPTED
from topotune.bench.faults.site import NAME, Driver, Site
from topotune.records import TrialSpec
from topotune.search.study.address import ENVIRONMENT
from topotune.tracking.outbox import OUTBOX_FILE
from topotune.train.checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE, CheckpointStore

OUTAGE_SECONDS = 30.0
_WAITS, _BACK = "waiting: ", "the study database is back"


def _told(text: str, reason: str) -> None:
    """The outage was said, once, and its end too."""
    count = len(re.findall(re.escape(reason) + r",\s+waiting", text))
    expect(count == 1, f"{reason!r} was said {count} times: {text[-800:]}")
    expect(text.count(_BACK) == 1, f"the end of the outage was not said: {text[-800:]}")


@contextmanager
def _locked(site: Site) -> Iterator[None]:
    """Another process's exclusive lock on the study, given back at the end."""
    with closing(sqlite3.connect(site.results / NAME / "study.db", timeout=30)) as other:
        other.isolation_level = None
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


def _sqlite_locked(site: Site) -> str:
    driver = site.start("search", site.search_file())
    site.reach(driver, 0, 1)
    with _locked(site):
        time.sleep(OUTAGE_SECONDS)
        expect(driver.process.poll() is None, f"the driver has ended: {driver.output()[-800:]}")
    _told(driver.finish(), "is locked by another process")
    return f"waited {OUTAGE_SECONDS:.0f} s and went on; {audit(site)}"


def _locked_and_interrupted(site: Site) -> str:
    driver = site.start("search", site.search_file())
    site.reach(driver, 0, 1)
    with _locked(site):
        site.wait(lambda: _WAITS in driver.output(), 60, "the lock is not said", driver.output)
        began = time.monotonic()
        driver.send(signal.SIGINT)
        driver.finish(INTERRUPTED, GONE_WITHIN)
        site.all_gone(GONE_WITHIN - (time.monotonic() - began))
        took = time.monotonic() - began
    site.run("resume", NAME)
    return f"ended after {took:.0f} s; {audit(site, kills=1)}"


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _postgresql_restarted(site: Site) -> str:
    with Postgres() as server, _environment(ENVIRONMENT, server.uri):
        driver = site.start("search", site.search_file())
        site.reach(driver, 0, 1)
        server.stop()
        time.sleep(OUTAGE_SECONDS)
        expect(driver.process.poll() is None, f"the driver has ended: {driver.output()[-800:]}")
        server.start()
        site.wait(lambda: _BACK in driver.output(), 60, "its return is not said", driver.output)
        _told(driver.output(), "does not answer")  # a longer crash would be said again
        server.stop(signal.SIGQUIT)  # a crash, this time
        server.start()
        site.reach(driver, 2, 1)
        _kill(driver)
        site.run("resume", NAME)
        expect(not (site.results / NAME / "study.db").exists(), "a study file was made")
        _nowhere(site.folder, server.password)
        return f"waited {OUTAGE_SECONDS:.0f} s and went on, resumed; {audit(site, kills=1)}"


def _nowhere(folder: Path, secret: str) -> None:
    """No file of the site holds the secret."""
    for path in folder.rglob("*"):
        if path.is_file() and secret.encode() in path.read_bytes():
            expect(False, f"the password is in {path}")


def _kill(driver: Driver) -> None:
    driver.send(signal.SIGKILL)
    driver.wait(30)


def _kill_all(site: Site, driver: Driver) -> None:
    """Kill the driver, and wait until its workers have noticed."""
    _kill(driver)
    site.wait(lambda: not site.processes(), 60, "processes are left")


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _scrambled(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 4)
        file.write(random.Random(0).randbytes(size // 2))


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


_DAMAGES: tuple[Callable[[Path], None], ...] = (_truncated, _scrambled, _emptied, Path.unlink)


def _study_damaged(site: Site) -> str:
    """Once in each trial, with what was not yet moved from the write-ahead log gone, too."""
    driver = site.start("search", site.search_file())
    path = site.results / NAME / "study.db"
    for trial, damage in enumerate(_DAMAGES):
        site.reach(driver, trial, 1)
        _kill_all(site, driver)
        for log in (path.with_name("study.db-wal"), path.with_name("study.db-shm")):
            log.unlink(missing_ok=True)
        damage(path)
        if trial == 0:
            refused = site.start("status", NAME).finish(2, 60)
            expect("topotune resume" in " ".join(refused.split()), f"status: {refused}")
        driver = site.start("resume", NAME)
    text = driver.finish()
    expect("rebuilt from the records of" in " ".join(text.split()), f"not said: {text[-800:]}")
    aside = sorted(file.name for file in path.parent.glob("study.damaged-*.db"))
    expect(len(aside) == len(_DAMAGES) - 1, f"moved aside: {aside}")
    return f"rebuilt {len(_DAMAGES)} times; {audit(site, kills=len(_DAMAGES))}"


def _checkpoints_damaged(site: Site) -> str:
    """The newest in the first trial, both in the second; what each session trains is counted."""
    budget = {"trials": 3, "epochs": 6}
    driver = site.start("search", site.search_file({"pause": 0.2}, budget=budget))
    kept, trained = [], []
    for trial, damaged in enumerate(((CHECKPOINT_FILE,), (CHECKPOINT_FILE, PREVIOUS_FILE))):
        site.reach(driver, trial, 3)
        _kill_all(site, driver)
        (row,) = (row for row in site.status()["trials"] if row["number"] == trial)
        store = CheckpointStore(site.search.trial(trial), TrialSpec.from_dict(row["spec"]))
        kept.append(_epochs_in(store))
        trained.append(site.trained())
        expect(3 <= kept[-1] < budget["epochs"], f"killed after {kept[-1]} epochs")
        for name in damaged:
            _truncated(site.search.trial(trial) / name)
        left = _epochs_in(store)
        expect(left == (0 if PREVIOUS_FILE in damaged else kept[-1] - 1), f"{left} epochs are left")
        driver = site.start("resume", NAME)
    driver.finish()
    trained.append(site.trained())
    # The rest of the first trial; the second's epochs, and perhaps one that the kill cut short.
    once = trained[1] - trained[0] - (budget["epochs"] - kept[0]) - kept[1]
    expect(once in (1, 2), f"{once} epochs were trained again or cut short")
    again = trained[2] - trained[1] - (budget["epochs"] - kept[1]) - budget["epochs"]
    expect(again == kept[1], f"{again} epochs of {kept[1]} were trained again")
    return f"1, then {again} epochs trained again; {audit(site, trials=3)}"


def _epochs_in(store: CheckpointStore) -> int:
    """Epochs in the newest whole checkpoint of a trial."""
    state = store.load_or_restart()
    return 0 if state is None else len(state["history"])


def _ledger_damaged(site: Site) -> str:
    driver = site.start("search", site.search_file())
    for trial, damage in enumerate((_truncated, _scrambled)):
        site.reach(driver, trial, 2)
        _kill_all(site, driver)
        spent = site.status()["wall_seconds"]
        damage(site.search.ledger)
        text = site.run("status", NAME, "--json")
        expect("ledger is damaged" in text, f"not said: {text[:500]}")
        left = json.loads(text[text.index("\n{") :])["wall_seconds"]
        expect(0 < left <= spent, f"wall time {left} s after the damage, {spent} s before")
        driver = site.start("resume", NAME)
    driver.finish()
    return str(audit(site, kills=2))


def _outbox_torn(site: Site) -> str:
    """A line that was being written when the machine stopped."""
    driver = site.start("search", site.search_file())
    site.reach(driver, 1, 1)
    _kill_all(site, driver)
    path = site.search.root / OUTBOX_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as file:
        file.write(lines[-1][: len(lines[-1]) // 2])
    site.run("resume", NAME)
    return str(audit(site, kills=1))


STUDY = (
    Scenario(
        "study-locked",
        f"SQLite study locked by another process for {OUTAGE_SECONDS:.0f} s",
        "waits with back-off, says so once, goes on",
        _sqlite_locked,
        60,
    ),
    Scenario(
        "study-locked-interrupted",
        "Ctrl-C while the SQLite study is locked by another process",
        f"ends within {GONE_WITHIN:.0f} s as an abort does, resumable",
        _locked_and_interrupted,
        45,
    ),
    Scenario(
        "study-postgresql-restarted",
        f"PostgreSQL study gone for {OUTAGE_SECONDS:.0f} s, then crashed, then the driver killed",
        "waits with back-off, says so once, goes on; the password is in no file",
        _postgresql_restarted,
        90,
    ),
    Scenario(
        "study-damaged",
        "driver killed and study file truncated, scrambled, emptied, removed, one after the other",
        "detected; rebuilt from the trials' records; said; no finished trial lost",
        _study_damaged,
        90,
    ),
    Scenario(
        "checkpoints-damaged",
        "driver killed and the newest checkpoint truncated; then both of another trial",
        "the previous one is used; without one the trial starts over",
        _checkpoints_damaged,
        60,
    ),
    Scenario(
        "ledger-damaged",
        "driver killed and the ledger truncated, then scrambled",
        "detected; the previous one is used; said in the log",
        _ledger_damaged,
        60,
    ),
    Scenario(
        "outbox-torn",
        "driver killed and half a line left at the end of the outbox",
        "detected by length and checksum; cut off; nothing lost",
        _outbox_torn,
        45,
    ),
)
