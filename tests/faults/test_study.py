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

import pytest

from tests.faults.invariants import audit
from tests.faults.site import NAME, Seen, Site
from tests.postgres import Postgres
from topotune.records import TrialSpec
from topotune.settings import STUDY_URI
from topotune.tracking.outbox import OUTBOX_FILE
from topotune.train.checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE, CheckpointStore

OUTAGE_SECONDS = 30.0
WAITS, BACK = "waiting: ", "the study database is back"


@pytest.mark.faults
def test_study_locked(site: Site, seen: Seen) -> None:
    """SQLite study locked by another process for half a minute: waits with back-off, says so once,
    goes on."""
    driver = site.search(0, 1)
    with locked(site):
        time.sleep(OUTAGE_SECONDS)
        driver.works()
    outage_is_said(driver.finish(), "is locked by another process")
    seen(f"waited {OUTAGE_SECONDS:.0f} s and went on; {audit(site)}")


@pytest.mark.faults_full
def test_study_locked_interrupted(site: Site, seen: Seen) -> None:
    """Ctrl-C while the SQLite study is locked by another process: ends within 20 s as an abort
    does, resumable."""
    driver = site.search(0, 1)
    with locked(site):
        site.says(driver, WAITS)
        began = time.monotonic()
        driver.send(signal.SIGINT)
        site.interrupted(driver, began)
        took = time.monotonic() - began
    site.run("resume", NAME)
    seen(f"ended after {took:.0f} s; {audit(site, kills=1)}")


@pytest.mark.faults_full
def test_study_postgresql_restarted(
    site: Site, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL study gone for half a minute, then crashed, then the driver killed: waits with
    back-off, says so once, goes on; the password is in no file."""
    with Postgres() as server:
        monkeypatch.setenv(STUDY_URI, server.uri)
        driver = site.search(0, 1)
        server.stop()
        time.sleep(OUTAGE_SECONDS)
        driver.works()
        server.start()
        site.says(driver, BACK)
        outage_is_said(driver.output(), "does not answer")  # a longer crash would be said again
        server.stop(signal.SIGQUIT)  # a crash, this time
        server.start()
        site.reach(driver, 2, 1)
        driver.kill()
        site.run("resume", NAME)
        assert not (site.root / "study.db").exists(), "a study file was made"
        for path in site.folder.rglob("*"):
            held = path.is_file() and server.password.encode() in path.read_bytes()
            assert not held, f"the password is in {path}"
        seen(f"waited {OUTAGE_SECONDS:.0f} s and went on, resumed; {audit(site, kills=1)}")


@pytest.mark.faults
def test_study_damaged(site: Site, seen: Seen) -> None:
    """Driver killed and study file truncated, scrambled, emptied, removed, one after the other:
    detected; rebuilt from the trials' records; said; no finished trial lost."""
    driver = site.start("search", site.search_file())
    path = site.root / "study.db"
    for trial, damage in enumerate(DAMAGES):
        site.reach(driver, trial, 1)
        site.killed(driver)
        # What was not yet moved from the write-ahead log is gone, too.
        for log in (path.with_name("study.db-wal"), path.with_name("study.db-shm")):
            log.unlink(missing_ok=True)
        damage(path)
        if trial == 0:
            refused = site.start("status", NAME).finish(2, 60)
            assert "topotune resume" in " ".join(refused.split()), f"status: {refused}"
        driver = site.start("resume", NAME)
    text = driver.finish()
    assert "rebuilt from the records of" in " ".join(text.split()), f"not said: {text[-800:]}"
    aside = sorted(file.name for file in path.parent.glob("study.damaged-*.db"))
    assert len(aside) == len(DAMAGES) - 1, f"moved aside: {aside}"
    seen(f"rebuilt {len(DAMAGES)} times; {audit(site, kills=len(DAMAGES))}")


@pytest.mark.faults
def test_checkpoints_damaged(site: Site, seen: Seen) -> None:
    """Driver killed and the newest checkpoint truncated; then both of another trial: the previous
    one is used; without one the trial starts over."""
    budget = {"trials": 3, "epochs": 6}
    driver = site.start("search", site.search_file({"pause": 0.2}, budget=budget))
    kept, trained = [], []
    for trial, damaged in enumerate(((CHECKPOINT_FILE,), (CHECKPOINT_FILE, PREVIOUS_FILE))):
        site.reach(driver, trial, 3)
        site.killed(driver)
        spec = TrialSpec.from_dict(site.rows()[trial]["spec"])
        store = CheckpointStore(site.kept.trial(trial), spec)
        kept.append(epochs_in(store))
        trained.append(site.trained())
        assert 3 <= kept[-1] < budget["epochs"], f"killed after {kept[-1]} epochs"
        for name in damaged:
            truncate(site.kept.trial(trial) / name)
        left = epochs_in(store)
        assert left == (0 if PREVIOUS_FILE in damaged else kept[-1] - 1), f"{left} epochs are left"
        driver = site.start("resume", NAME)
    driver.finish()
    trained.append(site.trained())
    # The rest of the first trial; the second's epochs, and perhaps one that the kill cut short.
    once = trained[1] - trained[0] - (budget["epochs"] - kept[0]) - kept[1]
    assert once in (1, 2), f"{once} epochs were trained again or cut short"
    again = trained[2] - trained[1] - (budget["epochs"] - kept[1]) - budget["epochs"]
    assert again == kept[1], f"{again} epochs of {kept[1]} were trained again"
    seen(f"1, then {again} epochs trained again; {audit(site, trials=3)}")


@pytest.mark.faults_full
def test_ledger_damaged(site: Site, seen: Seen) -> None:
    """Driver killed and the ledger truncated, then scrambled: detected; the previous one is used;
    said in the log."""
    driver = site.start("search", site.search_file())
    for trial, damage in enumerate((truncate, scramble)):
        site.reach(driver, trial, 2)
        site.killed(driver)
        spent = site.status()["wall_seconds"]
        damage(site.kept.ledger)
        text = site.run("status", NAME, "--json")
        assert "ledger is damaged" in text, f"not said: {text[:500]}"
        left = json.loads(text[text.index("\n{") :])["wall_seconds"]
        assert 0 < left <= spent, f"wall time {left} s after the damage, {spent} s before"
        driver = site.start("resume", NAME)
    driver.finish()
    seen(audit(site, kills=2))


@pytest.mark.faults_full
def test_outbox_torn(site: Site, seen: Seen) -> None:
    """Driver killed and half a line left at the end of the outbox: detected by length and checksum;
    cut off; nothing lost."""
    site.killed(site.search(1, 1))
    path = site.root / OUTBOX_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as file:
        file.write(lines[-1][: len(lines[-1]) // 2])
    site.run("resume", NAME)
    seen(audit(site, kills=1))


@contextmanager
def locked(site: Site) -> Iterator[None]:
    """Another process's exclusive lock on the study, given back at the end."""
    with closing(sqlite3.connect(site.root / "study.db", timeout=30)) as other:
        other.isolation_level = None
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


def outage_is_said(text: str, reason: str) -> None:
    """Once, and its end too."""
    count = len(re.findall(re.escape(reason) + r",\s+waiting", text))
    assert count == 1, f"{reason!r} was said {count} times: {text[-800:]}"
    assert text.count(BACK) == 1, f"the end of the outage was not said: {text[-800:]}"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scramble(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 4)
        file.write(random.Random(0).randbytes(size // 2))


def empty(path: Path) -> None:
    os.truncate(path, 0)


DAMAGES: tuple[Callable[[Path], None], ...] = (truncate, scramble, empty, Path.unlink)


def epochs_in(store: CheckpointStore) -> int:
    """Epochs in the newest whole checkpoint of a trial."""
    state = store.load_or_restart()
    return 0 if state is None else len(state["history"])
