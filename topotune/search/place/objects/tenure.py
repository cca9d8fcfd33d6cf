"""The right to drive a search of an object store, held by one process at a time: a row of the
study's database.

An object store has no locks, and all drivers of such a search share the database anyway. The row
works as the lease file does (:mod:`topotune.search.place.lease`): its holder raises a beat, and
whoever wants it watches whether that changes; clocks are never compared. The change of hands is one
conditional update, so of two that watched a dead holder one gets it. A lock of the session was not
taken: a restarted database or a pooler of connections drops it without a word, and the driver of a
host that lost its network would hold it for as long as the server believes in the connection.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, replace
from typing import Any, Self

import psutil
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from topotune.errors import LeaseLostError, ResourceError, SearchFolderError
from topotune.search.place.lease import BEAT_SECONDS, EXPIRY_SECONDS, Holder, this_machine
from topotune.search.study.address import with_driver
from topotune.search.study.patience import Patience

_FRESH_SECONDS = 1.0
_TABLE = """
CREATE TABLE IF NOT EXISTS topotune_drivers (
    search text PRIMARY KEY,
    holder text NOT NULL,
    changed timestamptz NOT NULL DEFAULT now()
)
"""
_TAKE = text(
    "INSERT INTO topotune_drivers (search, holder) VALUES (:search, :new) ON CONFLICT DO NOTHING"
)
_LOOK = text("SELECT holder FROM topotune_drivers WHERE search = :search")
_SWAP = text(
    "UPDATE topotune_drivers SET holder = :new, changed = now() "
    "WHERE search = :search AND holder = :old"
)
_LIVES = text(
    "SELECT holder FROM topotune_drivers WHERE search = :search AND holder <> '' "
    "AND changed > now() - make_interval(secs => :age)"
)
_log = logging.getLogger(__name__)


class Tenure:
    """Held between ``__enter__`` and ``__exit__``; kept alive by a thread.

    Args:
        url: the study's database.
        search: what is driven; the same whichever way leads to it.
        patience: how to wait for the database at the beginning.
    """

    def __init__(self, url: URL, search: str, patience: Patience) -> None:
        self._engine, self._search, self._patience = _engine(url), search, patience
        me = Holder(os.getpid(), socket.gethostname(), this_machine(), uuid.uuid4().hex)
        self._me, self._held = me, ""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._looked, self._lost = 0.0, ""
        self._working = threading.RLock()

    def __enter__(self) -> Self:
        """Take it.

        Raises:
            SearchFolderError: another process holds it; the text names its host and pid.
            ResourceError: the database cannot be used.
        """
        try:
            self._patience(lambda: _make_table(self._engine))
            self._take()
        except BaseException:
            self._engine.dispose()
            raise
        self._thread = threading.Thread(target=self._beat, name="tenure", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(BEAT_SECONDS)
        with contextlib.suppress(SQLAlchemyError):
            self._swap(self._held, "")
        self._engine.dispose()

    def _take(self) -> None:
        mine = _written(self._me)
        values = {"search": self._search, "new": mine}
        if self._patience(lambda: self._run(_TAKE, values)) == 1:
            self._held = mine
            return
        seen = self._patience(self._look)
        if seen and not _ended_here(seen):
            self._outlast(seen)
        if seen == mine or self._patience(lambda: self._swap(seen, mine)):
            self._held = mine
            return
        if (found := self._patience(self._look)) != mine:  # whose answer was lost on the way
            raise self._refused(found)
        self._held = mine

    def _outlast(self, seen: str) -> None:
        """Watch a holder until it is dead.

        Raises:
            SearchFolderError: it lives.
        """
        holder = _parsed(seen)
        self._patience.note(
            f"{holder} holds this search; watching for {EXPIRY_SECONDS:.0f} s whether it lives"
        )
        end = time.monotonic() + EXPIRY_SECONDS
        while time.monotonic() < end:
            time.sleep(_FRESH_SECONDS)
            if (found := self._patience(self._look)) != seen:
                raise self._refused(found)
        self._patience.note(f"{holder} is dead; taking over")

    def check(self) -> None:
        """Make sure that it is still ours; cheap enough to ask before every change.

        While the database is away no other can take it, and nothing can be changed there: that is
        no answer, and who waits for the database asks again when it is back.

        Raises:
            LeaseLostError: another driver took it while this process could not run.
        """
        with self._working:
            now = time.clock_gettime(time.CLOCK_BOOTTIME)  # counts a suspended machine's time
            if not self._lost and now - self._looked > _FRESH_SECONDS:
                self._looked = now
                try:
                    found = self._look()
                except SQLAlchemyError:
                    return
                if found != self._held:
                    self._lost = str(_parsed(found) or "a driver that has ended since")
        if self._lost:
            raise LeaseLostError(
                f"{self._search}: the search was taken over by {self._lost} while this process was "
                "suspended or cut off. It stops here and writes nothing more; 'topotune status' "
                "shows how far the search is"
            )

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with self._working:
                me = replace(self._me, beat=self._me.beat + 1)
                try:
                    if self._swap(self._held, _written(me)):
                        self._me, self._held = me, _written(me)
                        continue
                    found = self._look()
                except SQLAlchemyError as error:
                    _log.warning("the next beat tries again: %s", type(error).__name__)
                    continue
                theirs = _parsed(found)
                if theirs is not None and theirs.token == me.token:  # its answer was lost
                    self._me, self._held = theirs, found
                    continue
                self._lost = str(theirs or "a driver that has ended since")
                return

    def _look(self) -> str:
        with self._engine.begin() as connection:
            row = connection.execute(_LOOK, {"search": self._search}).first()
        return "" if row is None else str(row[0])

    def _swap(self, old: str, new: str) -> bool:
        return self._run(_SWAP, {"search": self._search, "old": old, "new": new}) == 1

    def _run(self, statement: Any, values: dict[str, Any]) -> int:
        with self._engine.begin() as connection:
            return connection.execute(statement, values).rowcount

    def _refused(self, found: str) -> SearchFolderError:
        return SearchFolderError(
            f"{self._search}: this search is being driven by {_parsed(found) or 'another process'}."
            " Wait for it or stop it; 'topotune status' shows how far it is"
        )


def tenant(url: URL, search: str) -> str | None:
    """Who drives a search, by its last word; None without a recent sign of life.

    Raises:
        ResourceError: the database cannot be asked.
    """
    engine = _engine(url)
    try:
        with engine.begin() as connection:
            if not _has_table(connection):
                return None
            values = {"search": search, "age": EXPIRY_SECONDS}
            row = connection.execute(_LIVES, values).first()
    except SQLAlchemyError as error:
        raise ResourceError(
            f"study database: cannot be asked who drives {search}: {type(error).__name__}. Try "
            "again when it answers"
        ) from error
    finally:
        engine.dispose()
    holder = None if row is None else _parsed(str(row[0]))
    return None if holder is None or _ended_here(_written(holder)) else str(holder)


def _engine(url: URL) -> Engine:
    from topotune.search.study.database import POSTGRESQL

    options = {"pool_size": 1, "pool_pre_ping": True}
    return create_engine(with_driver(url), connect_args=dict(POSTGRESQL), **options)


def _has_table(connection: Connection) -> bool:
    found = connection.execute(text("SELECT to_regclass('topotune_drivers')")).scalar()
    return found is not None


def _make_table(engine: Engine) -> None:
    with engine.begin() as connection:
        if _has_table(connection):
            return
    try:
        with engine.begin() as connection:
            connection.execute(text(_TABLE))
    except SQLAlchemyError:  # two at once: PostgreSQL lets one of them fail
        with engine.begin() as connection:
            if not _has_table(connection):
                raise


def _written(holder: Holder) -> str:
    return json.dumps(asdict(holder))


def _parsed(written: str) -> Holder | None:
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return Holder(**json.loads(written))
    return None


def _ended_here(written: str) -> bool:
    """Whether a holder was a process of this machine that is no more."""
    holder = _parsed(written)
    return (
        holder is not None
        and holder.machine == this_machine()
        and isinstance(holder.pid, int)
        and not psutil.pid_exists(holder.pid)
    )
