"""Sends what the spools hold to the tracking store, in the background and however long it takes."""

from __future__ import annotations

import fcntl
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from topotune.errors import SpoolError, TopotuneError
from topotune.redaction import redact
from topotune.tracking.delivery import Delivery
from topotune.tracking.progress import Progress, Refused
from topotune.tracking.spool import DRIVER_SPOOL
from topotune.tracking.store import RunMissingError, Store, StoreOfflineError, StoreRefusedError
from topotune.tracking.tails import Tails, read_piece

_FIRST_DELAY = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShipStatus:
    """How shipping stands. An item is one metric point, parameter, tag, artifact or end.

    Attributes:
        recorded: items in the spools.
        shipped: items that the store took.
        refused: items that it will never take; see ``refused.jsonl``.
        pending: items that wait.
        damaged: spool lines that could not be read.
        last_error: why nothing moves, in one line without secrets; empty if all is well.
        offline_since: Unix time of the first failure in a row; None if all is well.
    """

    recorded: int
    shipped: int
    refused: int
    pending: int
    damaged: int
    last_error: str
    offline_since: float | None


@dataclass(frozen=True)
class Reconciliation:
    """The final count, in items as in :class:`ShipStatus`: recorded is the sum of the others."""

    recorded: int
    shipped: int
    refused: int
    pending: int

    @property
    def complete(self) -> bool:
        """Whether the store took everything that was recorded."""
        return self.recorded == self.shipped


class Shipper:
    """Tails all spools of a search and sends what is new.

    Nothing here can stop a search: without a store it counts, waits (1 s, doubling to 30 s) and
    tries again; the spools keep everything meanwhile. Sent twice is stored once. Only one process
    ships a search at a time; a second one waits for the first.

    Args:
        search_folder: the search's folder.
        store: where to.
        search_id: the search's unique id, by which its runs are found again.
        name: the search's name, its run's name in MLflow.
        interval: seconds between two looks at the spools.
        longest_delay: seconds between two tries, at most, while the store cannot be reached.

    Raises:
        SpoolError: ``refused.jsonl`` cannot be read.
    """

    def __init__(
        self,
        search_folder: Path,
        store: Store,
        search_id: str,
        name: str,
        interval: float = 2.0,
        longest_delay: float = 30.0,
    ) -> None:
        self._folder = search_folder
        self._store = store
        self._search_id = search_id
        self._interval = interval
        self._longest_delay = longest_delay
        self._progress = Progress(search_folder, store.label)
        self._refused = Refused(search_folder)
        self._delivery = Delivery(
            search_folder, store, search_id, name, self._progress, self._refused
        )
        self._tails = Tails(search_folder)
        self._last_error = ""
        self._offline_since: float | None = None
        self._working = threading.Lock()
        self._stop = threading.Event()
        self._deadline = math.inf
        self._turn = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Ship in a daemon thread until :meth:`close`."""
        self._thread = threading.Thread(target=self._loop, name="topotune-shipper", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        delay = _FIRST_DELAY
        while not self._stop.is_set():
            if self.ship_once():
                delay = _FIRST_DELAY
                self._stop.wait(self._interval)
            else:
                self._stop.wait(delay)
                delay = min(2 * delay, self._longest_delay)
        while not (self.ship_once() and self.status().pending == 0):
            left = self._deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(_FIRST_DELAY, left))

    def close(self, timeout: float = 30.0) -> Reconciliation:
        """Send what is left for at most ``timeout`` seconds, stop the thread, and count.

        The thread does it, so that no server, however slow, can hold the caller for longer. A
        request that is still under way when the time is up is abandoned; what it carried counts
        as pending and is sent again by the next shipper.
        """
        self._deadline = time.monotonic() + timeout
        self._stop.set()
        if timeout > 0 and (self._thread is None or not self._thread.is_alive()):
            self.start()
        if self._thread is not None:
            self._thread.join(timeout)
        try:
            self._tails.count()
        except SpoolError as error:
            self._failed(str(error))
        status = self.status()
        return Reconciliation(status.recorded, status.shipped, status.refused, status.pending)

    def status(self) -> ShipStatus:
        """How it stands, from memory: cheap, and never waits for the store."""
        recorded, shipped, refused = self._tails.items, self._progress.shipped, len(self._refused)
        return ShipStatus(
            recorded=recorded,
            shipped=shipped,
            refused=refused,
            pending=max(0, recorded - shipped - refused),
            damaged=self._tails.damaged,
            last_error=self._last_error,
            offline_since=self._offline_since,
        )

    def ship_once(self) -> bool:
        """Send everything that the spools hold now; True if that succeeded.

        Rounds take about a megabyte of each spool in turn, so that no trial's backlog holds up
        the others. Where it fails, :meth:`status` says why.
        """
        with self._working:
            try:
                self._count()
                with self._only_shipper():
                    self._count()
                    if self._progress.fresh:  # what another store refused is offered anew
                        self._refused.clear()
                    while self._round():
                        self._count()
            except (StoreOfflineError, SpoolError, OSError) as error:
                self._failed(str(error))
                return False
            except Exception as error:  # noqa: BLE001 - a thread that died would send nothing more
                self._failed(f"{type(error).__name__}: {error}")
                return False
            if self._last_error:
                _log.warning("tracking store %s: back", self._store.label)
            self._last_error, self._offline_since = "", None
            return True

    def rewind(self) -> None:
        """Forget what was sent, so that everything is sent again (which stores it once)."""
        with self._working:
            self._progress.clear()
            self._refused.clear()

    def _failed(self, reason: str) -> None:
        reason = " ".join(redact(reason).split())[:300]
        if not self._last_error:
            self._offline_since = time.time()
            _log.warning("tracking store %s: %s; spooling goes on", self._store.label, reason)
        self._last_error = reason

    def _count(self) -> None:
        """Count what the spools hold, and see what another shipper sent meanwhile."""
        self._progress.refresh()
        for name in self._tails.count():
            _log.warning("%s: was cut; it is sent again", self._folder / name)
            self._progress.restart(name)

    def _round(self) -> bool:
        """One piece of every spool that has news; True if there was any.

        Trials come before the driver, so that a run begins when its trial began. Begins where the
        last round broke off, so that neither a slow server nor two records that
        make it fail keep the same spools waiting for ever.
        """
        moved = False
        failure: StoreOfflineError | None = None
        ends = sorted(self._tails.ends(), key=lambda end: end[0] == DRIVER_SPOOL)
        turn = self._turn % len(ends) if ends else 0
        for index, (name, counted) in enumerate(ends[turn:] + ends[:turn]):
            if self._progress.of(name).offset >= counted:
                continue
            self._turn = turn + index
            if time.monotonic() > self._deadline:
                failure = failure or StoreOfflineError(self._last_error or "out of time")
                break
            try:
                self._ship(name)
                moved = True
            except RunMissingError as error:
                self._progress.clear()
                self._refused.clear()
                raise StoreOfflineError(f"{error}; everything is sent again") from None
            except StoreOfflineError as error:
                # One record that makes a server fail must not hold up the other spools, but a
                # server that is down must not be asked once a trial.
                if failure is not None:
                    break
                failure = error
        if moved:
            self._progress.save()
        if failure is not None:
            raise failure
        self._turn = 0
        return moved

    def _ship(self, name: str) -> None:
        piece = read_piece(self._folder, name, self._progress.of(name).offset)
        try:
            taken = self._delivery.send(name, piece.entries, by_driver=name == DRIVER_SPOOL)
        except StoreRefusedError as error:  # a run could not be made: no single item's fault
            raise StoreOfflineError(str(error)) from None
        except (TopotuneError, OSError):
            raise
        except Exception as error:  # it must not hold up the other spools either
            raise StoreOfflineError(f"{type(error).__name__}: {error}") from error
        self._progress.advance(name, piece.last, piece.end, taken)

    @contextmanager
    def _only_shipper(self) -> Iterator[None]:
        with (self._folder / ".shipper.lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreOfflineError("another process ships this search now") from None
            yield
