"""The right to drive a search, held by one process at a time, on one machine or several.

Two guards. The kernel's lock on the file is dropped with the process, so on one machine a second
driver is refused, and a dead one replaced, at once. Network file systems do not always share that
lock between machines; there the file's content counts: the holder raises its ``beat`` every few
seconds, and another machine's driver watches whether it changes. Clocks are never compared.
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


def this_machine() -> str:
    """A name of this machine since it was started; its containers have names of their own."""
    try:
        return f"{_BOOT.read_text(encoding='ascii').strip()} {_PROCESSES.readlink()}"
    except OSError:
        return socket.gethostname()


def _read(path: Path) -> Holder | None:
    """The holder in the file, opened anew so that a network file system looks; None for none."""
    with contextlib.suppress(OSError, ValueError):
        return _parse(path.read_text(encoding="utf-8"))
    return None


def _parse(text: str) -> Holder | None:
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return Holder(**json.loads(text))
    return None


class Lease:
    """Held between ``__enter__`` and ``__exit__``; kept alive by a thread.

    Args:
        path: the lease's file.
        note: gets a line when another machine's lease is watched, and when it is taken over.
    """

    def __init__(self, path: Path, note: Callable[[str], None] = lambda text: None) -> None:
        self._path, self._note = path, note
        self._me = Holder(os.getpid(), socket.gethostname(), this_machine(), uuid.uuid4().hex)
        self._file: IO[str] | None = None
        self._over = threading.Event()
        self._looked = 0.0
        self._lost = ""
        self._writing = threading.RLock()  # a look never meets a beat that is half written

    def __enter__(self) -> Self:
        """Take the lease.

        Raises:
            SearchFolderError: another process holds it; the text names its host and pid.
            ResourceError: the folder cannot be written.
        """
        try:
            file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ResourceError(f"{self._path}: cannot be written: {error.strerror}") from error
        try:
            locked = _lock(file, self._path)
            holder = _read(self._path)
            if holder is not None and not (locked and holder.machine == self._me.machine):
                self._outlast(holder)
            self._file = file
            self._write()
            if holder is not None:
                # Another machine may have watched the same dead lease to the same end.
                time.sleep(_FRESH_SECONDS)
            self.check(force=True)
        except BaseException:
            self._file = None
            file.close()
            raise
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with self._writing:
            file, self._file = self._file, None
            if file is not None:
                with contextlib.suppress(OSError, LeaseLostError, ResourceError):
                    self.check(force=True)
                    file.truncate(0)  # no one waits for it, and a driver that slept finds it lost
                file.close()

    def check(self, force: bool = False) -> None:
        """Make sure that the lease is still ours; cheap enough to ask before every change.

        It is ours only while the file says so: who took it over may have ended since, and have
        left it empty.

        Raises:
            LeaseLostError: another driver took it while this process could not run.
            ResourceError: the file cannot be read now.
        """
        with self._writing:
            now = _time_since_boot()
            if not self._lost and (force or now - self._looked > _FRESH_SECONDS):
                try:
                    text = self._path.read_text(encoding="utf-8", errors="replace")
                except FileNotFoundError:
                    text = ""
                except OSError as error:
                    raise ResourceError(
                        f"{self._path}: cannot be read: {error.strerror}. Mend the disk, then "
                        "resume"
                    ) from error
                self._looked = now
                found = _parse(text)
                if found is None or found.token != self._me.token:
                    self._lost = str(found or "a driver that has ended since")
        if self._lost:
            raise LeaseLostError(
                f"{self._path.parent}: the search was taken over by {self._lost} while this "
                "process was suspended or cut off. It stops here and writes nothing more; "
                "'topotune status' shows how far the search is"
            )

    def _outlast(self, holder: Holder) -> None:
        """Watch another machine's lease until it is dead.

        Raises:
            SearchFolderError: it lives.
        """
        self._note(
            f"{holder} left its lease here; watching for {EXPIRY_SECONDS:.0f} s whether it lives"
        )
        end = time.monotonic() + EXPIRY_SECONDS
        while time.monotonic() < end:
            time.sleep(_FRESH_SECONDS)
            found = _read(self._path)
            if found is None:
                return
            if found != holder:
                raise _refused(self._path, str(found))
        self._note(f"the lease of {holder} is dead; taking over")

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with self._writing:
                if self._file is None:
                    return
                try:
                    self.check(force=True)
                    self._me = replace(self._me, beat=self._me.beat + 1)
                    self._write()
                except LeaseLostError:
                    return  # raised by the next change
                except ResourceError as error:
                    _log.warning("%s; the next beat tries again", error)

    def _write(self) -> None:
        text = json.dumps(asdict(self._me)).ljust(_BYTES - 1) + "\n"
        try:
            handle = os.open(self._path, os.O_WRONLY)
            try:
                os.pwrite(handle, text.encode(), 0)
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise ResourceError(f"{self._path}: cannot be written: {error.strerror}") from error


def lease_holder(path: Path) -> str | None:
    """Who drives the search ("pid 12 on host"), or None without a driver.

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


def _lock(file: IO[str], path: Path) -> bool:
    """Lock, trying for a moment ('topotune status' holds the file for an instant); whether this
    file system has locks at all."""
    for attempt in range(10, -1, -1):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not attempt:
                holder = _read(path)
                raise _refused(path, str(holder) if holder else "another process") from None
            time.sleep(0.05)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            raise
    raise AssertionError("the last attempt returns or raises")


def _refused(path: Path, holder: str) -> SearchFolderError:
    return SearchFolderError(
        f"{path.parent}: this search is being driven by {holder}. Wait for it or stop it; "
        "'topotune status' shows how far it is"
    )


def _time_since_boot() -> float:
    """Monotonic, and unlike ``time.monotonic`` it counts the time that a machine was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
