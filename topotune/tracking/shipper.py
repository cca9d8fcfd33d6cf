"""Sends what the outbox holds to the tracking store, in the background, however long it takes."""

from __future__ import annotations

import fcntl
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from topotune.errors import OutboxError, TopotuneError
from topotune.redaction import redact
from topotune.tracking.delivery import Delivery
from topotune.tracking.entries import Entry, size
from topotune.tracking.outbox import Piece, outbox_size, read_piece
from topotune.tracking.progress import REFUSED_FILE, Progress, Refused
from topotune.tracking.store import RunMissingError, Store, StoreOfflineError, StoreRefusedError

_FIRST_DELAY = 1.0
_MOST_FAILURES = 2
"""In a round: one record that makes a server fail must not hold up the other runs, but a server
that is down must not be asked once a run."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShipStatus:
    """How shipping stands. An item is one metric point, parameter, tag, artifact or end.

    Attributes:
        recorded: items in the outbox.
        shipped: items that the store took.
        refused: items that it will never take; see ``refused.jsonl``.
        pending: items that wait; recorded is the sum of the three.
        damaged: lines of the outbox that could not be read.
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

    @property
    def complete(self) -> bool:
        """Whether the store took everything that was recorded."""
        return self.recorded == self.shipped


@dataclass
class _Held:
    """A run whose records are not sent from an offset on, and how many items those are."""

    offset: int
    items: int


class Shipper:
    """Follows the outbox of a search and sends what is new.

    Nothing here can stop a search: without a store it counts, waits (1 s, doubling to 30 s) and
    tries again; the outbox keeps everything meanwhile. Sent twice is stored once. Only one process
    ships a search at a time; a second one waits for the first.

    The records of a run are sent in their order. A run whose records the store fails on is held
    back while the others go on; what is saved as sent ends before the first record that is not.

    Args:
        search_folder: the search's folder.
        store: where to.
        search_id: the search's unique id, by which its runs are found again.
        name: the search's name, its run's name in MLflow.
        interval: seconds between two looks at the outbox.
        longest_delay: seconds between two tries, at most, while the store cannot be reached.

    Raises:
        OutboxError: ``refused.jsonl`` cannot be read.
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
        self._interval = interval
        self._longest_delay = longest_delay
        self._progress = Progress(search_folder, store.label)
        self._refused = Refused(search_folder)
        self._delivery = Delivery(
            search_folder, store, search_id, name, self._progress, self._refused
        )
        self._piece: tuple[int, Piece] | None = None
        self._last_error = ""
        self._offline_since: float | None = None
        self._working = threading.Lock()
        self._counting = threading.RLock()
        self._stop = threading.Event()
        self._deadline = math.inf
        self._thread: threading.Thread | None = None
        self._begin()

    def _begin(self) -> None:
        """Go on from what is saved as sent; the outbox is counted anew."""
        if len(self._refused) < self._progress.refused:
            _log.warning("%s: lacks refused items; all is sent again", self._folder / REFUSED_FILE)
            self._progress.offset = self._progress.refused = 0
        self._counted = self._recorded = self._damaged = 0
        self._ahead = self._progress.offset  # what lies before is sent, but for what is held back
        self._passed = 0  # items before that
        self._held: dict[int | None, _Held] = {}
        self._failures: Counter[int | None] = Counter()
        self._turn = 0
        self._piece = None

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

    def close(self, timeout: float = 30.0) -> ShipStatus:
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
            self._look()
        except OutboxError as error:
            self._failed(str(error))
        return self.status()

    def status(self) -> ShipStatus:
        """How it stands, from memory: cheap, and never waits for the store."""
        with self._counting:
            recorded, refused = self._recorded, len(self._refused)
            waiting = sum(held.items for held in self._held.values())
            shipped = max(0, self._passed - waiting - refused)
            return ShipStatus(
                recorded=recorded,
                shipped=shipped,
                refused=refused,
                pending=max(0, recorded - shipped - refused),
                damaged=self._damaged,
                last_error=self._last_error,
                offline_since=self._offline_since,
            )

    def ship_once(self) -> bool:
        """Send everything that the outbox holds now; True if that succeeded.

        Where it fails, :meth:`status` says why.
        """
        with self._working:
            try:
                self._look()
                with self._only_shipper():
                    self._look()
                    if self._ahead == 0:  # what another store refused is offered anew
                        self._refused.clear()
                    self._send()
            except (StoreOfflineError, OutboxError, OSError) as error:
                self._failed(str(error))
                return False
            except Exception as error:  # noqa: BLE001 - a thread that died would send nothing more
                self._failed(f"{type(error).__name__}: {error}")
                return False
            if self._last_error:
                _log.warning("tracking store %s: back", self._store.label)
            self._last_error, self._offline_since = "", None
            return True

    def _forget(self) -> None:
        """Forget what was sent, so that everything is sent again, which stores it once."""
        self._progress.clear()
        self._refused.clear()
        with self._counting:
            self._begin()
            self._look()

    def _failed(self, reason: str) -> None:
        reason = " ".join(redact(reason).split())[:300]
        if not self._last_error:
            self._offline_since = time.time()
            _log.warning("tracking store %s: %s; recording goes on", self._store.label, reason)
        self._last_error = reason

    def _look(self) -> None:
        """Count what the outbox holds, and see what another shipper sent meanwhile."""
        with self._counting:
            if self._progress.refresh():
                self._refused.refresh()
                self._begin()
            if outbox_size(self._folder) < max(self._counted, self._ahead):
                _log.warning("%s: the outbox was cut; it is sent again", self._folder)
                self._progress.offset = 0
                self._begin()
            while (piece := self._read(self._counted)).end > self._counted:
                for start, reason in piece.damaged:
                    _log.warning(
                        "%s: record at byte %d skipped: %s", self._folder.name, start, reason
                    )
                self._damaged += len(piece.damaged)
                for offset, entry in piece.entries:
                    items = size(entry)
                    self._recorded += items
                    self._passed += items if offset < self._ahead else 0
                self._counted = piece.end

    def _read(self, offset: int) -> Piece:
        """A piece of the outbox; what was counted last is mostly what is sent next."""
        if outbox_size(self._folder) <= offset:
            return Piece((), (), offset, offset)
        cached = self._piece
        if cached is None or cached[0] != offset:
            cached = (offset, read_piece(self._folder, offset))
        self._piece = None if cached[1].end == offset else cached  # a line may not be whole yet
        return cached[1]

    def _send(self) -> None:
        """What is new comes first, then what was held back."""
        failures: list[StoreOfflineError] = []
        try:
            while self._ahead < self._counted:
                self._pass_on(failures)
            self._retry(failures)
        finally:
            offset = min((held.offset for held in self._held.values()), default=self._ahead)
            if offset != self._progress.offset:
                self._progress.offset = offset
                self._progress.refused = len(self._refused)
                self._progress.save()
        if failures:
            raise failures[0]

    def _pass_on(self, failures: list[StoreOfflineError]) -> None:
        """Send the next piece, or hold it back where the store has failed too often."""
        piece = self._read(self._ahead)
        end = min(piece.end, self._counted)  # what came since the count is counted and sent later
        for trial, entries in self._groups(piece, end).items():
            items = sum(size(entry) for _, entry in entries)
            sent = trial not in self._held and self._try(entries, failures)
            with self._counting:
                self._passed += items
                if not sent:
                    held = self._held.setdefault(trial, _Held(entries[0][0], 0))
                    held.items += items
        self._ahead = end

    def _retry(self, failures: list[StoreOfflineError]) -> None:
        """Offer again what is held back, from where the last round broke off."""
        first = min((held.offset for held in self._held.values()), default=self._ahead)
        for start in dict.fromkeys(
            (self._turn if first < self._turn < self._ahead else first, first)
        ):
            offset, known = start, {t: h.offset for t, h in self._held.items() if h.offset >= start}
            while offset < self._ahead and len(failures) < _MOST_FAILURES:
                piece = self._read(offset)
                for trial, entries in self._groups(piece, self._ahead, known).items():
                    if not self._try(entries, failures):
                        known.pop(trial)
                        continue
                    with self._counting:
                        held = self._held[trial]
                        held.offset = piece.end
                        held.items -= sum(size(entry) for _, entry in entries)
                offset = self._turn = piece.end
        with self._counting:
            self._held = {trial: held for trial, held in self._held.items() if held.items > 0}

    def _groups(
        self, piece: Piece, end: int, known: Mapping[int | None, int] | None = None
    ) -> dict[int | None, list[tuple[int, Entry]]]:
        """A piece's records by their runs: those that the store fails on come last, and before
        them the search itself, whose page links to the trials' runs.

        Args:
            piece: the piece.
            end: where to stop.
            known: only runs that are held back, and from where on; None for all.
        """
        groups: dict[int | None, list[tuple[int, Entry]]] = {}
        for offset, entry in piece.entries:
            if offset < end and (known is None or known.get(entry.trial, end) <= offset):
                groups.setdefault(entry.trial, []).append((offset, entry))
        order = sorted(groups, key=lambda trial: (self._failures[trial], trial is None))
        return {trial: groups[trial] for trial in order}

    def _try(self, entries: list[tuple[int, Entry]], failures: list[StoreOfflineError]) -> bool:
        """Send records of one run; False, and one more failure, where the store fails on them."""
        if len(failures) >= _MOST_FAILURES:
            return False
        trial = entries[0][1].trial
        try:
            if time.monotonic() > self._deadline:
                raise StoreOfflineError(self._last_error or "out of time")
            self._delivery.send(entries)
        except RunMissingError as error:
            self._forget()
            raise StoreOfflineError(f"{error}; everything is sent again") from None
        except (StoreOfflineError, StoreRefusedError) as error:
            # Refused is a run that could not be made: no single item's fault.
            failures.append(StoreOfflineError(str(error)))
        except (TopotuneError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - it must not hold up the other runs either
            failures.append(StoreOfflineError(f"{type(error).__name__}: {error}"))
        else:
            del self._failures[trial]
            return True
        self._failures[trial] += 1
        return False

    @contextmanager
    def _only_shipper(self) -> Iterator[None]:
        with (self._folder / ".shipper.lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreOfflineError("another process ships this search now") from None
            yield
