"""A worker's side of a search in a store: its trial's files come before it, and go after each
epoch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from topotune.errors import TopotuneError
from topotune.search.place.objects import layout
from topotune.search.place.objects.address import StoreAddress, scratch, worker_folder
from topotune.search.place.objects.replica import Replica
from topotune.search.place.objects.store import ObjectStore
from topotune.search.ray.watchdog import GUARD_FILE

KEEP_SECONDS = 24 * 3600.0
"""How long a node keeps a trial's folder that a dead worker has left: it may hold an epoch more
than the store does, which is otherwise trained again."""
NOTE_SECONDS = 5.0
"""How long a worker that ends itself may take to send why."""


class Courier:
    """Carries one trial's files between this node and the store.

    Args:
        address: the store.
        name: the search.
        number: the trial.
        beat: the trial's sign of life, called while the store is waited for.

    Attributes:
        search: the search's folder on this node.
    """

    def __init__(
        self, address: StoreAddress, name: str, number: int, beat: Callable[[], None]
    ) -> None:
        self.search = worker_folder(address, name)
        self.folder = self.search / layout.trial_name(number)
        self._state = self.search / ".state" / f"{number:04d}.json"
        self._address, self._prefix = address, f"{name}/{layout.trial_name(number)}"
        self._replica = Replica(
            ObjectStore(address, beat=beat),
            self._prefix,
            self.folder,
            self._state,
            layout.WORKER_CLAIM,
            layout.of_worker,
        )
        with contextlib.suppress(OSError):
            self._state.parent.mkdir(parents=True, exist_ok=True)
        # Held by another process, an orphan of a killed driver, say: the claim tells them apart.
        self._lock, self._alone = _lock(self._state)
        self._opened = False

    def fetch(self) -> None:
        """Take the trial over, as far as the store or this node has it, whichever has more.

        Raises:
            ResourceError: the store or the folder cannot be used.
        """
        if not self._opened:
            sweep()
            self._replica.open()
            self._opened = True

    def push(self) -> None:
        """Send what has changed, in an order that a crash at any point is survived by.

        Raises:
            LeaseLostError: another worker has taken the trial over.
            ResourceError: the store or the folder cannot be used.
        """
        if self._opened:
            self._replica.push()

    def place(self, name: str) -> str:
        """Where a file of the trial is for everybody."""
        return f"{self._address.place}/{self._prefix}/{name}"

    def send_note(self) -> None:
        """Send why this process is about to end itself; for a few seconds at most."""

        def send() -> None:
            store = ObjectStore(self._address, limit=NOTE_SECONDS)
            with contextlib.suppress(TopotuneError):
                store.upload(self.folder / GUARD_FILE, f"{self._prefix}/{GUARD_FILE}")

        thread = threading.Thread(target=send, name="crash note", daemon=True)
        thread.start()
        thread.join(NOTE_SECONDS)

    def close(self) -> None:
        """Leave the trial; its folder goes, unless it holds what the store does not."""
        with contextlib.suppress(OSError, TopotuneError):
            # Another worker of this node may have taken the trial over, and use the folder.
            if self._opened and self._alone and self._replica.clean and self._replica.ours:
                self._state.unlink(missing_ok=True)
                shutil.rmtree(self.folder, ignore_errors=True)
                self._state.with_suffix(".lock").unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def sweep(now: float | None = None) -> list[Path]:
    """Delete what dead workers left on this node long ago; the folders that went."""
    now = time.time() if now is None else now
    gone = []
    for home in (scratch() / "workers").glob("*/*/trials/[0-9]*"):
        state = home.parent.parent / ".state" / home.name
        try:
            newest = max(path.stat().st_mtime for path in (home, *home.iterdir()))
            if now - newest < KEEP_SECONDS:
                continue
        except OSError:
            continue
        lock, alone = _lock(state)
        with contextlib.suppress(OSError):
            if alone:
                state.with_suffix(".json").unlink(missing_ok=True)
                shutil.rmtree(home)
                gone.append(home)
        if lock is not None:
            os.close(lock)
    return gone


def _lock(state: Path) -> tuple[int | None, bool]:
    """The lock of a trial's folder on this node, None where it cannot be opened; and whether no
    other process holds it."""
    try:
        lock = os.open(state.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return None, False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return lock, False
    return lock, True
