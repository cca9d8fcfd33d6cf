"""Faults of what a search is kept in: its study, its checkpoints and outbox."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.invariants import audit
from tests.faults.site import NAME, Driver, Seen, Site
from tests.postgres import Postgres
from topotune.records import TrialSpec
from topotune.search.place.folder import STUDY_COPY, STUDY_FILE
from topotune.settings import STUDY_URI
from topotune.tracking.outbox import OUTBOX_FILE
from topotune.train.checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE, CheckpointStore

OUTAGE_SECONDS = 30.0
WAITS, BACK = "waiting: ", "the study database is back"


@pytest.mark.faults_full
def test_study_away_interrupted(site: Site, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the PostgreSQL study is away: ends within 20 s as an abort does, resumable."""
    with Postgres() as server:
        monkeypatch.setenv(STUDY_URI, server.uri)
        driver = site.search(0, 1)
        server.stop()
        site.says(driver, WAITS)
        began = time.monotonic()
        driver.send(signal.SIGINT)
        site.interrupted(driver, began)
        took = time.monotonic() - began
        server.start()
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
        assert not (site.root / STUDY_COPY).exists(), "a study of the folder was made"
        for path in site.folder.rglob("*"):
            held = path.is_file() and server.password.encode() in path.read_bytes()
            assert not held, f"the password is in {path}"
        seen(f"waited {OUTAGE_SECONDS:.0f} s and went on, resumed; {audit(site, kills=1)}")


@pytest.mark.faults
def test_study_damaged(site: Site, seen: Seen) -> None:
    """Driver killed and study file truncated, scrambled, emptied, a bit of it flipped, removed, one
    after the other: detected; made whole from its copy; said; nothing lost."""
    trials = len(DAMAGES)
    budget = {"trials": trials, "epochs": 3}
    driver = site.start("search", site.search_file(budget=budget))
    path = site.root / STUDY_FILE
    for trial, damage in enumerate(DAMAGES):
        site.reach(driver, trial, 1)
        site.killed(driver)
        before = site.status()
        damage(path)
        assert site.status() == before, "status shows something else after the damage"
        driver = site.start("resume", NAME)
        site.wait(partial(repaired, driver), 60, "the repair is not said", driver.output)
    driver.finish()
    aside = sorted(file.name for file in site.root.glob("study.damaged-*.jsonl"))
    assert len(aside) == 2, f"moved aside: {aside}"  # the others have nothing to look at
    seen(f"made whole {trials} times; {audit(site, kills=trials, trials=trials)}")


@pytest.mark.faults_full
def test_study_damaged_twice(site: Site, seen: Seen) -> None:
    """Driver killed and study file and copy scrambled: refused with the lines; one that is brought
    back from a backup is enough, and nothing is lost."""
    site.killed(site.search(1, 1))
    files = [site.root / STUDY_FILE, site.root / STUDY_COPY]
    backup = files[0].read_bytes()
    for path in files:
        scramble(path)
    for command in ("status", "resume"):
        refused = " ".join(site.start(command, NAME).finish(2, 120).split())
        assert "the study is damaged (study.jsonl at line" in refused, f"{command}: {refused}"
        assert "Bring one back from a backup" in refused, f"{command}: {refused}"
    files[1].write_bytes(backup)
    site.run("resume", NAME)
    seen(audit(site, kills=1))


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


def repaired(driver: Driver) -> bool:
    """Whether a driver has said that it made the study whole."""
    return f"made whole from {STUDY_COPY}" in " ".join(driver.output().split())


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


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


DAMAGES: tuple[Callable[[Path], None], ...] = (truncate, scramble, empty, flip, Path.unlink)


def epochs_in(store: CheckpointStore) -> int:
    """Epochs in the newest whole checkpoint of a trial."""
    state = store.load_or_restart()
    return 0 if state is None else len(state["history"])
