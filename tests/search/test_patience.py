"""A study database that is away is waited for, one that refuses for good ends the session."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import optuna
import pytest

from tests.postgres import Postgres
from tests.search_cases import Desk, make_config
from topotune.errors import ResourceError
from topotune.search.place.addresses import remembered
from topotune.search.study import patience as module
from topotune.search.study.database import PatientStorage
from topotune.search.study.ledger import MAX_GAP, Ledger
from topotune.search.study.patience import Patience, StudyAwayError, absence
from topotune.search.study.rows import Spent
from topotune.search.study.store import Handout
from topotune.settings import STUDY_URI


def patience_of(desk: Desk) -> Patience:
    found: Patience = desk.store._storage._database.patience  # type: ignore[attr-defined]
    return found


def test_a_study_that_is_away_is_waited_for_and_said_once(desk: Desk, server: Postgres) -> None:
    notes: list[str] = []
    patience_of(desk).note = notes.append
    server.stop()
    timer = threading.Timer(4.0, server.start)
    timer.start()
    began = time.monotonic()
    turn = desk.book.next()
    assert time.monotonic() - began >= 4
    timer.join()
    assert isinstance(turn, Handout)
    assert len(notes) == 2
    assert notes[0].startswith("the study database does not answer, waiting: ")
    assert notes[1] == "the study database is back; going on"
    desk.train(turn)
    desk.run()
    assert [row.number for row in desk.rows()] == list(range(6))


def test_the_waiting_ends_at_its_limit_and_soon_after_ctrl_c(
    desk: Desk, server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    patience = patience_of(desk)
    server.stop()
    try:
        patience.limit = 1.5
        with pytest.raises(ResourceError, match=r"does not answer, for \d+ s now"):
            desk.store.next()
        patience.limit, patience.stopping = 600.0, lambda: "stopped by SIGINT"
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            desk.store.next()
        assert time.monotonic() - began < 20
    finally:
        patience.stopping = lambda: ""
        server.start()


def test_an_answer_that_was_lost_makes_nothing_twice(
    server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STUDY_URI, server.uri)
    desk = Desk(tmp_path, remembered(make_config(warm_start=[{"lr": 0.01}])))
    storage: PatientStorage = desk.store._storage._database  # type: ignore[attr-defined]

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
    desk.store.close()


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


def test_storage_methods_are_all_patient() -> None:
    assert PatientStorage.__abstractmethods__ == frozenset()
    overridden = {
        name
        for name in dir(optuna.storages._CachedStorage)
        if not name.startswith("_")
        and getattr(optuna.storages._CachedStorage, name, None)
        is not getattr(optuna.storages.BaseStorage, name, None)
    }
    heartbeat = {name for name in overridden if "heartbeat" in name or "callback" in name}
    assert overridden - heartbeat - {"get_best_trial"} <= set(vars(PatientStorage))


def test_devices_are_charged_while_the_study_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    kept: list[Spent] = []
    ledger = Ledger(Spent(0.0, {}), kept.append)
    patience = Patience("here")
    patience.waiting = lambda: ledger.charge([3])

    def away() -> None:
        if clock[0] < 1000.0 + 10 * MAX_GAP - 30:
            raise StudyAwayError("does not answer")

    patience(away)
    assert kept == []  # the study is where it would be kept
    ledger.tick([3])
    assert len(kept) == 1
    assert ledger.trials == {3: pytest.approx(clock[0] - 1000.0)}
    assert ledger.device_seconds > 9 * MAX_GAP
