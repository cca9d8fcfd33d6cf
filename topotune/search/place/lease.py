"""The lease of a search: the right to drive it, held by one process at a time.

Its holder renews it every few seconds by raising its ``beat``; another machine's driver watches
whether that changes. Clocks are never compared. Here is the lease in a file of the search's folder;
:mod:`topotune.search.place.row_lease` keeps one in a database.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Self

from topotune.errors import LeaseLostError, ResourceError, SearchFolderError

BEAT_SECONDS = 5.0
EXPIRY_SECONDS = 30.0
"""How long another machine's lease is watched before it counts as dead."""
_FRESH_SECONDS = 1.0  # a look at the file that is younger than this is trusted
_BYTES = 512  # the content's fixed length: a beat needs no new room on a full disk
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PROCESSES = Path("/proc/self/ns/pid")
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        pid, host: of the process, for a person.
        machine: tells machines of equal host names apart, and a machine from itself before a
            restart.
        token: unique to one holding.
        beat: raised while it is held.
    """

    pid: int
    host: str
    machine: str
    token: str
    beat: int = 0

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"

    @classmethod
    def here(cls) -> Self:
        """This process, about to acquire a lease."""
        return cls(os.getpid(), socket.gethostname(), this_machine(), uuid.uuid4().hex)

    @classmethod
    def from_json(cls, text: str) -> Self | None:
        """The inverse of :meth:`to_json`; None of any other text."""
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            return cls(**json.loads(text))
        return None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def this_machine() -> str:
    """A name of this machine since it was started; its containers have names of their own."""
    try:
        return f"{_BOOT.read_text(encoding='ascii').strip()} {_PROCESSES.readlink()}"
    except OSError:
        return socket.gethostname()


class Lease(ABC):
    """Held between ``__enter__`` and ``__exit__``; renewed by a thread.

    Args:
        place: what is driven, for messages.
        note: called with a line when another machine's lease is watched, and when it is taken over.
    """

    def __init__(self, place: str, note: Callable[[str], None]) -> None:
        self._place, self._note = place, note
        self._me = Holder.here()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._looked = 0.0
        self._lost = ""
        self._working = threading.RLock()  # a look never meets a beat that is half written

    @abstractmethod
    def _acquire(self) -> None:
        """Write our name where no other holder lives; leaves nothing open where that fails."""

    @abstractmethod
    def _look(self) -> Holder | None:
        """Who holds the lease, for a process that waits for it."""

    @abstractmethod
    def _present(self) -> Holder | None:
        """Who holds the lease, for a process that has acquired it.

        Raises:
            ResourceError: it cannot be read.
        """

    @abstractmethod
    def _write(self) -> None:
        """Replace our own earlier entry by the present one.

        Raises:
            ResourceError: it cannot be written.
        """

    @abstractmethod
    def _release(self) -> None:
        """Empty what we wrote, if it is still ours."""

    def __enter__(self) -> Self:
        """Acquire the lease.

        Raises:
            SearchFolderError: another process holds it; the text names its host and pid.
            ResourceError: its place cannot be used.
        """
        self._acquire()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(BEAT_SECONDS)
        self._release()

    def check(self, force: bool = False) -> None:
        """Make sure that the lease is still ours; cheap enough to ask before every change.

        It is ours only while its place says so: who took it over may have ended since, and have
        left it empty.

        Raises:
            LeaseLostError: another driver took it while this process could not run.
            ResourceError: it cannot be read now.
        """
        with self._working:
            now = time.clock_gettime(time.CLOCK_BOOTTIME)  # counts a suspended machine's time
            if not self._lost and (force or now - self._looked > _FRESH_SECONDS):
                found = self._present()
                self._looked = now
                if found is None or found.token != self._me.token:
                    self._lost = str(found or "a driver that has ended since")
        if self._lost:
            raise LeaseLostError(
                f"{self._place}: the search was taken over by {self._lost} while this process was "
                "suspended or cut off. It stops here and writes nothing more; 'topotune status' "
                "shows how far the search is"
            )

    def _outlast(self, holder: Holder, verb: str) -> None:
        """Watch another machine's lease until it is dead or released.

        Raises:
            SearchFolderError: it lives.
        """
        self._note(f"{holder} {verb}; watching for {EXPIRY_SECONDS:.0f} s whether it lives")
        end = time.monotonic() + EXPIRY_SECONDS
        while time.monotonic() < end:
            time.sleep(_FRESH_SECONDS)
            found = self._look()
            if found is None:
                return
            if found != holder:
                raise self._refused(found)
        self._note(f"{holder} is dead; taking over")

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with self._working:
                if self._over.is_set():
                    return
                try:
                    self.check(force=True)
                    self._me = replace(self._me, beat=self._me.beat + 1)
                    self._write()
                except LeaseLostError:
                    return  # the next check raises it again
                except ResourceError as error:
                    _log.warning("%s; the next beat tries again", error)

    def _refused(self, holder: Holder | None) -> SearchFolderError:
        return SearchFolderError(
            f"{self._place}: this search is being driven by {holder or 'another process'}. Wait "
            "for it or stop it; 'topotune status' shows how far it is"
        )


class FileLease(Lease):
    """The lease in a file, with a second guard.

    The kernel's lock on the file is dropped with the process, so on one machine a second driver is
    refused, and a dead one replaced, at once. Network file systems do not always share that lock
    between machines; there the file's content counts.

    Args:
        path: the lease's file.
        note: as for :class:`Lease`.
    """

    def __init__(self, path: Path, note: Callable[[str], None] = lambda text: None) -> None:
        super().__init__(str(path.parent), note)
        self._path = path
        self._file: IO[str] | None = None

    def _acquire(self) -> None:
        try:
            file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ResourceError(f"{self._path}: cannot be written: {error.strerror}") from error
        try:
            locked = self._lock(file)
            holder = self._look()
            if holder is not None and not (locked and holder.machine == self._me.machine):
                self._outlast(holder, "left its lease here")
            self._write()
            if holder is not None:
                # Another machine may have watched the same dead lease to the same end.
                time.sleep(_FRESH_SECONDS)
            self.check(force=True)
        except BaseException:
            file.close()
            raise
        self._file = file

    def _look(self) -> Holder | None:
        return _read(self._path)

    def _present(self) -> Holder | None:
        try:
            return Holder.from_json(self._path.read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ResourceError(
                f"{self._path}: cannot be read: {error.strerror}. Mend the disk, then resume"
            ) from error

    def _write(self) -> None:
        text = self._me.to_json().ljust(_BYTES - 1) + "\n"
        try:
            handle = os.open(self._path, os.O_WRONLY)
            try:
                os.pwrite(handle, text.encode(), 0)
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise ResourceError(f"{self._path}: cannot be written: {error.strerror}") from error

    def _release(self) -> None:
        with self._working:
            file, self._file = self._file, None
            if file is not None:
                with contextlib.suppress(OSError, LeaseLostError, ResourceError):
                    self.check(force=True)
                    file.truncate(0)  # an empty one need not be watched
                file.close()

    def _lock(self, file: IO[str]) -> bool:
        """Lock, trying for a moment ('topotune status' holds the file for an instant); whether this
        file system has locks at all."""
        for attempt in range(10, -1, -1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not attempt:
                    raise self._refused(self._look()) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return False
                raise
        raise AssertionError("the last attempt returns or raises")


def _read(path: Path) -> Holder | None:
    """The holder in the file, opened anew so that a network file system looks; None for none."""
    with contextlib.suppress(OSError, ValueError):
        return Holder.from_json(path.read_text(encoding="utf-8"))
    return None


def lease_holder(path: Path) -> str | None:
    """Who drives the search ("pid 12 on host"); None where it is not driven.

    Of another machine's driver only its word is known, and the answer says so.

    Raises:
        ResourceError: the file cannot be read.
    """
    holder = _read(path)
    try:
        with path.open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        pass
    except BlockingIOError:
        return str(holder) if holder else "another process"
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise ResourceError(
                f"{path}: cannot be read: {error.strerror}. Give this user read access to it; a "
                "search that nobody drives needs no such file"
            ) from error
    if holder is None or holder.machine == this_machine():
        return None
    return f"{holder}, if it still lives"
