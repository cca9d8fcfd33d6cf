"""The lease of a search of an object store: a row of the study's database.

An object store has no locks, and all drivers of such a search share the database anyway. The change
of hands is one conditional update, so of two that watched a dead holder one gets it. A lock of the
session was not taken: a restarted database or a pooler of connections drops it without a word, and
the driver of a host that lost its network would hold it for as long as the server believes in the
connection.
"""

from __future__ import annotations

import contextlib
from functools import partial

import psutil
from sqlalchemy import Connection, Engine, TextClause, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from topotune.errors import ResourceError
from topotune.search.place import lease
from topotune.search.place.lease import Holder, Lease, this_machine
from topotune.search.study.address import with_driver
from topotune.search.study.patience import Patience

_TABLE = """
CREATE TABLE IF NOT EXISTS topotune_drivers (
    search text PRIMARY KEY,
    holder text NOT NULL,
    changed timestamptz NOT NULL DEFAULT now()
)
"""
_INSERT = text(
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


class RowLease(Lease):
    """The lease in a row.

    Args:
        url: the study's database.
        search: what is driven; the same whichever way leads to it.
        patience: how to wait for the database at the beginning.
    """

    def __init__(self, url: URL, search: str, patience: Patience) -> None:
        super().__init__(search, patience.note)
        self._engine, self._patience = _engine(url), patience
        self._held = ""

    def _acquire(self) -> None:
        try:
            self._patience(lambda: _make_table(self._engine))
            self._insert_or_swap()
        except BaseException:
            self._engine.dispose()
            raise

    def _insert_or_swap(self) -> None:
        mine = self._me.to_json()
        inserted = self._patience(lambda: self._run(_INSERT, new=mine))
        # Each answer can be lost after the change was made: then the row holds what is ours.
        if not inserted and (seen := self._patience(self._text)) != mine:
            holder = _holder(seen)
            if holder is not None and not _ended_here(holder):
                self._outlast(holder, "holds this search")
            if not any(self._patience(partial(self._swap, old, mine)) for old in (seen, "")):
                found = self._patience(self._text)
                if found != mine:
                    raise self._refused(_holder(found))
        self._held = mine

    def _look(self) -> Holder | None:
        return _holder(self._patience(self._text))

    def _present(self) -> Holder | None:
        try:
            text = self._text()
        except SQLAlchemyError:
            return self._me  # while the database is away it cannot be taken over, either
        holder = _holder(text)
        if holder is not None and holder.token == self._me.token:
            self._held = text  # of a beat whose answer was lost, too
        return holder

    def _write(self) -> None:
        mine = self._me.to_json()
        try:
            if self._swap(self._held, mine):  # else the next check says who has it
                self._held = mine
        except SQLAlchemyError as error:
            raise ResourceError(f"{self._place}: {type(error).__name__}") from error

    def _release(self) -> None:
        with contextlib.suppress(SQLAlchemyError):
            self._swap(self._held, "")
        self._engine.dispose()

    def _text(self) -> str:
        with self._engine.begin() as connection:
            row = connection.execute(_LOOK, {"search": self._place}).first()
        return "" if row is None else str(row[0])

    def _swap(self, old: str, new: str) -> bool:
        return self._run(_SWAP, old=old, new=new) == 1

    def _run(self, statement: TextClause, **values: str) -> int:
        with self._engine.begin() as connection:
            return connection.execute(statement, {"search": self._place, **values}).rowcount


def row_holder(url: URL, search: str) -> str | None:
    """Who drives a search; None where its lease was not renewed lately.

    Raises:
        ResourceError: the database cannot be asked.
    """
    engine = _engine(url)
    try:
        with engine.begin() as connection:
            if not _has_table(connection):
                return None
            values = {"search": search, "age": lease.EXPIRY_SECONDS}
            row = connection.execute(_LIVES, values).first()
    except SQLAlchemyError as error:
        raise ResourceError(
            f"study database: cannot be asked who drives {search}: {type(error).__name__}. Try "
            "again when it answers"
        ) from error
    finally:
        engine.dispose()
    holder = None if row is None else Holder.from_json(str(row[0]))
    return None if holder is None or _ended_here(holder) else str(holder)


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


def _holder(written: str) -> Holder | None:
    """Who holds a row; what another version wrote is somebody's, too."""
    return (Holder.from_json(written) or Holder(0, "?", "", written)) if written else None


def _ended_here(holder: Holder) -> bool:
    """Whether a holder was a process of this machine that is no more."""
    return (
        holder.machine == this_machine()
        and isinstance(holder.pid, int)
        and not psutil.pid_exists(holder.pid)
    )
