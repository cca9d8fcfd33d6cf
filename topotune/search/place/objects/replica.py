"""A folder here and its copy in a store, with one writer at a time."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from topotune.errors import LeaseLostError
from topotune.files import make_folder
from topotune.search.place.objects import layout
from topotune.search.place.objects.address import write_scratch
from topotune.search.place.objects.store import ObjectStore
from topotune.search.place.output import OUTPUT_FILE
from topotune.search.ray.watchdog import GUARD_FILE
from topotune.train.checkpoint import PREVIOUS_FILE

_AT_ONCE = 8
"""Files on their way at a time; each waits for the network nearly all of its time."""


class Replica:
    """The files that one writer has in a folder and, under the same names, in a store.

    Args:
        store: the store.
        prefix: the folder's name in the store.
        folder: the folder here.
        state: a file beside it that remembers what is known of the store; losing it costs time.
        claim: name of the object that says who writes.
        owned: whether this writer writes a file, by its name relative to the folder.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        folder: Path,
        state: Path,
        claim: str,
        owned: Callable[[str], bool],
    ) -> None:
        self.store, self.folder = store, folder
        self._prefix, self._state, self._claim = prefix, state, f"{prefix}/{claim}"
        self._owned = owned
        self._writing = threading.RLock()
        self._sent: dict[str, tuple[int, int]] = {}
        self._mine = ""
        self._remember()

    def _remember(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            data: dict[str, Any] = json.loads(self._state.read_text(encoding="utf-8"))
            self._mine = str(data["claim"])
            self._sent = {str(k): (int(v[0]), int(v[1])) for k, v in data["sent"].items()}

    def _note_down(self) -> None:
        data = {"claim": self._mine, "sent": self._sent}
        write_scratch(self._state, json.dumps(data).encode())

    @property
    def ahead(self) -> bool:
        """Whether this machine wrote there last, so that the folder here is as new as the store, or
        newer; not one that others have deleted."""
        return self.ours and all((self.folder / name).exists() for name in self._sent)

    @property
    def ours(self) -> bool:
        """Whether what was written there last was written by this."""
        return bool(self._mine) and self.store.read(self._claim) == self._mine.encode()

    def open(self) -> dict[str, int]:
        """Take the writing over, the folder brought up to the store first.

        Returns:
            What the store has: sizes by names relative to the folder.

        Raises:
            ResourceError: the store or the folder cannot be used.
        """
        with self._writing:
            make_folder(self.folder)
            ahead = self.ahead
            listing = self.store.objects(self._prefix)
            if not ahead:
                # Forgotten first: a kill half-way through must not leave a mixture that looks ours.
                self._state.unlink(missing_ok=True)
                self._mine, self._sent = "", {}
                self._replace(listing)
            who = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
            claim = json.dumps(who)
            self.store.write(self._claim, claim.encode())
            self._mine = claim
            self._note_down()
            return listing

    def _replace(self, listing: dict[str, int]) -> None:
        # The guard of a worker holds its note open, and reads none of an earlier worker.
        names = [name for name in listing if self._owned(name) and name != GUARD_FILE]
        for name in list(self._files()):
            stale = self._owned(name) and name not in listing and name != GUARD_FILE
            if stale or name == PREVIOUS_FILE:
                (self.folder / name).unlink(missing_ok=True)
        bring(self.store, self._prefix, self.folder, names)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._sent[name] = _look(self.folder / name)

    def check(self) -> None:
        """Make sure that no other process has taken the writing over.

        Raises:
            LeaseLostError: one has.
            ResourceError: the store cannot be asked.
        """
        found = self.store.read(self._claim)
        if found != self._mine.encode():
            who = ""
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                data = json.loads(found or b"{}")
                who = f" by pid {data['pid']} on {data['host']}"
            raise LeaseLostError(
                f"{self.store.address}: {self._prefix} was taken over{who} while this process was "
                "suspended or cut off. It writes nothing more there"
            )

    def push(self, names: Iterable[str] | None = None) -> int:
        """Write what has changed here to the store, in the order of :func:`layout.rank`; how many
        files that were.

        Args:
            names: where to look; None for the whole folder.

        Raises:
            LeaseLostError: another writer has taken over; nothing was written.
            ResourceError: the store or the folder cannot be used.
        """
        with self._writing:
            changed = self._changed(names)
            if not changed:
                return 0
            self.check()

            def one(found: tuple[str, tuple[int, int]]) -> None:
                name, look = found  # looked at before it is read: what is added since goes later
                if self.store.upload(self.folder / name, f"{self._prefix}/{name}"):
                    self._sent[name] = look

            try:
                for rank in (0, 1):
                    each(one, [found for found in changed if layout.rank(found[0]) == rank])
            finally:
                self._note_down()
            return len(changed)

    def _changed(self, names: Iterable[str] | None = None) -> list[tuple[str, tuple[int, int]]]:
        """Files of ours that the store does not have as they are, each with how it looks."""
        changed = []
        for name in filter(self._owned, self._files() if names is None else names):
            with contextlib.suppress(FileNotFoundError):
                look = _look(self.folder / name)
                nothing = not look[0] and name in _EMPTY_IS_NOTHING
                if self._sent.get(name) != look and not nothing:
                    changed.append((name, look))
        return changed

    @property
    def clean(self) -> bool:
        """Whether all that is here is in the store, too."""
        return not self._changed()

    def forget(self, name: str) -> None:
        """Delete a file, or a folder whose name ends with ``/``, from the store."""
        with self._writing:
            self.check()
            if name.endswith("/"):
                self.store.delete_folder(f"{self._prefix}/{name[:-1]}")
                self._sent = {k: v for k, v in self._sent.items() if not k.startswith(name)}
            else:
                self.store.delete(f"{self._prefix}/{name}")
                self._sent.pop(name, None)

    def _files(self) -> Iterator[str]:
        for place, _, files in os.walk(self.folder):
            inner = Path(place).relative_to(self.folder).as_posix()
            for name in files:
                yield name if inner == "." else f"{inner}/{name}"


_EMPTY_IS_NOTHING = (GUARD_FILE, OUTPUT_FILE)
"""Files that are there, and empty, while nothing has gone wrong and nothing is printed."""


def _look(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def bring(store: ObjectStore, prefix: str, folder: Path, names: Iterable[str]) -> None:
    """Download files, several at a time; what the store lacks stays as it is."""
    wanted = [name for name in names if layout.belongs(name)]
    each(lambda name: store.download(f"{prefix}/{name}", folder / name), wanted)


def each(call: Callable[[Any], object], values: list[Any]) -> None:
    """Call for each value, several at a time; the first error, once those under way are done."""
    if len(values) < 2:
        for value in values:
            call(value)
        return
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="store") as pool:
        for done in [pool.submit(call, value) for value in values]:
            done.result()
