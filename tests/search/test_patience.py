"""A study database that is locked waits, one that is broken for good ends the session."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from tests.search_cases import Desk, make_config
from topotune.errors import ResourceError
from topotune.search.study import patience as module
from topotune.search.study.ledger import MAX_GAP, Ledger
from topotune.search.study.patience import Patience, StudyAwayError, absence
from topotune.search.study.storage import open_storage
from topotune.search.study.store import Handout

LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the write lock until its standard input is closed."""
    with subprocess.Popen(
        [sys.executable, "-c", LOCK, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process


def test_a_locked_study_is_waited_for_and_said_once(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    notes: list[str] = []
    desk.store._storage.patience.note = notes.append
    with locked(desk.folder.root / "study.db") as other:
        assert other.stdin is not None
        timer = threading.Timer(5.0, other.stdin.close)
        timer.start()
        began = time.monotonic()
        turn = desk.book.next()
        assert time.monotonic() - began >= 4
        timer.join()
    assert isinstance(turn, Handout)
    assert len(notes) == 2
    assert notes[0].startswith("the study database is locked by another process, waiting: ")
    assert notes[1] == "the study database is back; going on"
    desk.train(turn)
    desk.run()
    assert [row.number for row in desk.rows()] == list(range(6))


def test_the_waiting_ends_at_its_limit_and_soon_after_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    desk = Desk(tmp_path, make_config())
    patience = desk.store._storage.patience
    with locked(desk.folder.root / "study.db"):
        patience.limit = 1.5
        with pytest.raises(ResourceError, match=r"is locked by another process, for \d+ s now"):
            desk.store.next()
        patience.limit, patience.stopping = 600.0, lambda: "stopped by SIGINT"
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            desk.store.next()
        assert time.monotonic() - began < 20


def test_an_answer_that_was_lost_makes_nothing_twice(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config(warm_start=[{"lr": 0.01}]))
    storage = desk.store._storage

    class Deaf:
        """Carries each change out, then loses its first answer."""

        def __init__(self, inner: object) -> None:
            self._inner, self.lost = inner, 0

        def __getattr__(self, name: str) -> object:
            call = getattr(self._inner, name)
            if not name.startswith(("create", "set")):
                return call

            def once(*args: object, **kwargs: object) -> object:
                self.__dict__[name] = call
                call(*args, **kwargs)
                self.lost += 1
                raise StudyAwayError("does not answer")

            return once

    for _ in range(2):
        deaf = Deaf(storage.inner)
        storage.inner = deaf  # type: ignore[assignment]
        turn = desk.book.next()
        assert isinstance(turn, Handout)
        desk.train(turn)
        assert deaf.lost >= 5
        storage.inner = deaf._inner  # type: ignore[assignment]
    rows = desk.rows()
    assert [(row.number, row.state) for row in rows] == [(0, "COMPLETE"), (1, "COMPLETE")]
    assert rows[0].params == {"lr": 0.01}


def test_what_no_waiting_mends_ends_at_once_and_says_what_to_do(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    with pytest.raises(ResourceError, match=r"study\.db: .* Make space or make the folder") as info:
        desk.store._storage.patience(lambda: read_only(desk.folder.root / "study.db"))
    assert "readonly database" in str(info.value)


def read_only(path: Path) -> None:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        connection.execute("DELETE FROM trials")
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("text", "state", "waits"),
    [
        ("connection to server at 127.0.0.1 failed: Connection refused", None, True),
        ("connection failed: FATAL:  the database system is starting up", None, True),
        ("connection failed: FATAL:  sorry, too many clients already", None, True),
        ("terminating connection due to administrator command", "57P01", True),
        ('connection failed: FATAL:  password authentication failed for user "u"', None, False),
        ('connection failed: FATAL:  database "x" does not exist', None, False),
        ("could not extend file: No space left on device", "53100", False),
        ("permission denied for table trials", "42501", False),
    ],
)
def test_which_words_of_postgresql_are_waited_for(
    text: str, state: str | None, waits: bool
) -> None:
    class OperationalError(Exception):
        sqlstate = state

    assert (absence(OperationalError(text)) is not None) == waits


def test_storage_methods_are_all_patient(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    storage = open_storage(desk.folder, desk.config, Patience("here", limit=0.0))
    assert type(storage).__abstractmethods__ == frozenset()
    overridden = {
        name
        for name in dir(optuna.storages._CachedStorage)
        if not name.startswith("_")
        and getattr(optuna.storages._CachedStorage, name, None)
        is not getattr(optuna.storages.BaseStorage, name, None)
    }
    heartbeat = {name for name in overridden if "heartbeat" in name or "callback" in name}
    assert overridden - heartbeat - {"get_best_trial"} <= set(vars(type(storage)))
    assert storage.get_all_trials(1, states=(TrialState.RUNNING,)) == []
    storage.close()


def test_devices_are_charged_while_the_study_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    ledger = Ledger(tmp_path / "ledger.json", 1.0)
    patience = Patience("here")
    patience.waiting = lambda: ledger.tick([3])

    def away() -> None:
        if clock[0] < 1000.0 + 10 * MAX_GAP - 30:
            raise StudyAwayError("does not answer")

    patience(away)
    ledger.tick([3])
    assert ledger.trials == {3: pytest.approx(clock[0] - 1000.0)}
    assert ledger.device_seconds > 9 * MAX_GAP
