"""Waiting for a study database that is away, and words for one that stays so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from topotune.errors import ResourceError, TopotuneError
from topotune.redaction import redact

T = TypeVar("T")

LIMIT_SECONDS = 600.0
"""How long a running search waits for its study before it ends (resumable)."""
GRACE_SECONDS = 3.0
"""How long it still waits after the first Ctrl-C."""
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 5.0
_SILENT_SECONDS = 1.0  # a lock this short is everyday business

# PostgreSQL's: connection lost, shutting down or starting, too many connections, deadlocks.
_AWAY_STATES = ("08", "57P", "53300", "40001", "40P01", "55P03")
_AWAY_WORDS = ("starting up", "shutting down", "recovery", "not yet accepting", "too many", "slots")


class StudyAwayError(Exception):
    """The study database does not answer now and may later; the text says how it is."""


def absence(error: BaseException, disconnected: bool = False) -> str | None:
    """How a database is that does not answer now but may later; None for any other trouble.

    Args:
        error: what its driver raised.
        disconnected: whether the connection is known to be lost.
    """
    state = getattr(error, "sqlstate", None)
    text = " ".join(str(error).split())
    if disconnected or (state and state.startswith(_AWAY_STATES)):
        return "does not answer"
    refused = "FATAL" in text and not any(word in text for word in _AWAY_WORDS)
    # Without a state the connection was never made: by the network, unless the server said why.
    if type(error).__name__ in ("OperationalError", "ConnectionTimeout") and not state:
        return None if refused else "does not answer"
    return None


def origin(error: BaseException) -> BaseException:
    """What the database's driver raised, under the wrappings of Optuna and SQLAlchemy."""
    while isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    return error.orig if isinstance(error, DBAPIError) and error.orig is not None else error


def explained(error: BaseException, place: str) -> TopotuneError:
    """The error of ours for a study that cannot be used, whatever one waits.

    Args:
        error: what Optuna, SQLAlchemy or the database's driver raised.
        place: its address without secrets.
    """
    text = redact(" ".join(str(origin(error)).split()))[:300]
    return ResourceError(
        f"study database {place}: {text}. Check the address, the user and the password "
        "(TOPOTUNE_STUDY_URI), then resume"
    )


class Patience:
    """Repeats a call to a study database that is away, with growing pauses.

    Args:
        place: its address without secrets.
        note: called with a line when the waiting begins and when it is over.
        limit: seconds after which the waiting ends in an error.

    Attributes:
        stopping: asked while waiting: whether the search should end. It then waits for
            ``GRACE_SECONDS`` more and aborts, as a second Ctrl-C would: nothing can be saved.
        waiting: called every few seconds while waiting: what must go on, as workers do.
        fence: called when it was waited, before the call is made again; raises if another driver
            has taken the search over meanwhile.
    """

    def __init__(
        self,
        place: str,
        note: Callable[[str], None] = lambda text: None,
        limit: float = LIMIT_SECONDS,
    ) -> None:
        self.place, self.note, self.limit = place, note, limit
        self.stopping: Callable[[], object] = lambda: False
        self.waiting: Callable[[], object] = lambda: None
        self.fence: Callable[[], object] = lambda: None

    def __call__(self, call: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """The call's value, as soon as the database gives it.

        Args:
            call: one transaction.
            again: what is called instead from the second time on; it must expect that the first
                has been carried out though its answer was lost.

        Raises:
            ResourceError: the limit is over, or the database refuses for good.
            KeyboardInterrupt: the search was stopped meanwhile.
        """
        began = time.monotonic()
        delay, said, stop_at = _FIRST_DELAY, False, float("inf")
        while True:
            try:
                value = call()
            except (SQLAlchemyError, StorageInternalError, StudyAwayError) as error:
                away = _away(error)
                if away is None:
                    raise explained(error, self.place) from error
            else:
                if said:
                    self.note("the study database is back; going on")
                return value
            waited = time.monotonic() - began
            if waited > self.limit:
                raise ResourceError(
                    f"study database {self.place}: {away}, for {waited:.0f} s now. Nothing that is "
                    "finished is lost: resume when it is back"
                )
            if not said and waited > _SILENT_SECONDS:
                said = True
                self.note(f"the study database {away}, waiting: {self.place}")
            if self.stopping():
                stop_at = min(stop_at, time.monotonic() + GRACE_SECONDS)
                if time.monotonic() >= stop_at:
                    raise KeyboardInterrupt(f"stopped while the study database {away}")
                delay = _FIRST_DELAY
            call = again or call
            self.waiting()
            time.sleep(delay)
            self.fence()
            delay = min(2 * delay, _LONGEST_DELAY)


def _away(error: BaseException) -> str | None:
    if isinstance(error, StudyAwayError):
        return str(error)
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    return absence(origin(error), lost)
