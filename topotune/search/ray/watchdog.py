"""The watchdog of trials: a worker's process ends when its trial hangs or takes too much memory.

:class:`Guard` watches from within the process and ends it. :class:`Stalls` watches from the driver
and ends what can no longer end itself: a frozen process, or one in which a library hangs that holds
Python's lock.

Why a trial's process ended stands in ``guard.txt`` in the trial's folder, which is empty while all
is well and gone with the trial: the traceback of a hang, the line of Python under a fatal signal,
or the memory that was taken. The driver reads it and keeps it as ``crash-N.txt``
(:mod:`topotune.search.study.deaths`). Its modification time is the trial's sign of life.

Only a thread in C runs under that lock, and it knows no time but that of the clock, which goes on
while the whole machine is suspended. So it ends nothing; it leaves the traceback in ``hang.txt``,
which is evidence only where the driver finds that there was a hang.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from topotune.search.ray.ray_internals import end_worker

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

GUARD_FILE = "guard.txt"
HANG_FILE = "hang.txt"
MEMORY_PREFIX = "Memory: "
STALL_PREFIX = "Timeout ("
"""How a traceback begins that was written because of a hang, by faulthandler too."""
FROZEN_NOTE = "Frozen\n"
"""What the driver leaves in the crash file of a process that could not end itself."""
EXIT_CODE = 71
"""Exit code of a worker that ended itself."""
LOOK_EVERY = 1.0
DRIVER_LOOKS_EVERY = 2.0
LOOK_SHARE = 0.01
"""The largest part of a core that looks at the memory may take: each lists all processes."""
AUTO_SHARE = 0.9
"""Share of the machine's memory that ``limits.memory: auto`` allows."""
_PR_SET_CHILD_SUBREAPER = 36


class Guard:
    """Watches one trial in this process, while :meth:`watching`.

    Args:
        folder: the trial's folder.
        stall: seconds without a beat after which the process ends, of those that it was itself
            running in; None for no limit.
        memory: bytes of resident memory, children included, above which it ends; "auto" for most
            of the machine's; None for no limit.
        ending: called last when the process ends itself.
    """

    def __init__(
        self,
        folder: Path,
        stall: float | None,
        memory: float | Literal["auto"] | None,
        ending: Callable[[], None] = lambda: None,
    ) -> None:
        self._ending = ending
        self._stall = stall
        self._memory = AUTO_SHARE * machine_memory() if memory == "auto" else memory
        # Each beat starts a thread in C, so not every one of them.
        self._every = 5.0 if stall is None else min(stall / 20, 5.0)
        self._armed = 0.0
        self._before = set(psutil.Process().children(recursive=True))
        self._over = threading.Event()
        self._busy = threading.Event()
        self._beats = 0
        self._file, self._hang = _open(folder / GUARD_FILE), _open(folder / HANG_FILE)
        self._paths = folder / GUARD_FILE, folder / HANG_FILE
        faulthandler.enable(self._file)
        _adopt_orphans()
        self._watcher = threading.Thread(target=self._watch, name="guard", daemon=True)
        self._watcher.start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The trial opens or works; outside of this it waits for the driver, which is no stall."""
        self._armed = 0.0
        self.beat()
        self._busy.set()
        try:
            yield
        finally:
            self._busy.clear()
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """There was progress."""
        self._beats += 1
        now = time.monotonic()
        if now - self._armed < self._every:
            return
        self._armed = now
        if self._stall is not None:
            faulthandler.dump_traceback_later(self._stall, file=self._hang)
        with contextlib.suppress(OSError):  # a full disk stops nothing here
            os.utime(self._file)

    def close(self) -> None:
        """The trial is over: end what it has left running."""
        self._over.set()
        self._watcher.join()  # it must not write to a descriptor that the next trial gets
        faulthandler.disable()
        os.close(self._file)
        os.close(self._hang)
        for path in self._paths:
            with contextlib.suppress(OSError):
                path.unlink()
        left = set(psutil.Process().children(recursive=True)) - self._before
        if not left:
            return
        gc.collect()  # first the owners, so that a data loader ends its own processes in peace
        for child in left:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(left, timeout=2)

    def _watch(self) -> None:
        """Idle time is what this thread has seen to pass, a little at each look, so that a
        suspended machine counts for next to nothing."""
        stall = float("inf") if self._stall is None else self._stall
        every = min(LOOK_EVERY, stall / 10)
        idle, beats, last = 0.0, self._beats, time.monotonic()
        look = 0.0
        while not self._over.wait(every):
            now = time.monotonic()
            passed, last = min(now - last, 2 * every), now
            still = self._busy.is_set() and self._beats == beats
            idle, beats = idle + passed if still else 0.0, self._beats
            if idle > stall:
                self._end(f"{STALL_PREFIX}{stall:g} s)!\n")
            if self._busy.is_set() and now >= look:
                if excess := self._excess():
                    self._end(f"{MEMORY_PREFIX}{excess}\n")
                look = now + (time.monotonic() - now) / LOOK_SHARE

    def _excess(self) -> str:
        """The resident memory in words where it is too much; else empty."""
        # Pages that a fork shares count in each process; they are counted apart, which is
        # slow, only where it matters.
        if self._memory is None or resident(shared=True) <= self._memory:
            return ""
        taken = resident(shared=False)
        over = taken > self._memory
        return f"{_gib(taken)} resident, limit {_gib(self._memory)}" if over else ""

    def _end(self, why: str) -> None:
        """End the process, unless the trial has got through meanwhile."""
        if not self._busy.is_set():
            return
        with contextlib.suppress(OSError):
            os.write(self._file, why.encode())
            faulthandler.dump_traceback(self._file)
        with contextlib.suppress(OSError, RuntimeError):  # no memory for a thread, say
            self._ending()
        os._exit(EXIT_CODE)


class Stalls:
    """Watches the signs of life of the workers from outside.

    A worker ends itself when it hangs; this is for one that cannot. Idle time is what this process
    has itself seen to pass, a little at each look: no two machines' clocks are compared, and a
    suspended machine or a driver that was held up counts for next to nothing. A worker whose sign
    of life is not to be seen is not judged.

    Args:
        limit: ``limits.stall``; None looks at nothing.
        folder: a trial's folder.
    """

    def __init__(self, limit: float | None, folder: Callable[[int], Path]) -> None:
        self._patience = None if limit is None else 1.25 * limit + 5
        self._folder = folder
        self._last = time.monotonic()
        self._idle: dict[int, tuple[int, float]] = {}

    def look(self, working: dict[int, Trial]) -> None:
        """End the workers of trials that have been still for too long.

        Args:
            working: trial number to Tune's trial, of those that hold a device.
        """
        now = time.monotonic()
        if self._patience is None or now - self._last < DRIVER_LOOKS_EVERY:
            return
        passed = min(now - self._last, 2 * DRIVER_LOOKS_EVERY)
        self._last = now
        before, self._idle = self._idle, {}
        for number, trial in working.items():
            path = self._folder(number) / GUARD_FILE
            sign = _modified(path)
            if sign is None:
                continue
            known, idle = before.get(number, (sign, 0.0))
            idle = idle + passed if sign == known else 0.0
            self._idle[number] = (sign, idle)
            if idle > self._patience:
                with contextlib.suppress(OSError):
                    path.write_text(_hang(path.with_name(HANG_FILE), sign), encoding="utf-8")
                end_worker(trial)


def _hang(path: Path, since: int) -> str:
    """The traceback of a hang that began after a sign of life; else that the process is frozen."""
    written = _modified(path)
    if written is None or written <= since:
        return FROZEN_NOTE
    return path.read_text(encoding="utf-8", errors="replace") or FROZEN_NOTE


def _modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def resident(shared: bool) -> float:
    """Bytes of resident memory of this process and its children.

    Args:
        shared: count a page that several of them share once for each of them; else once.
    """
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss if shared else process.memory_full_info().pss
    return total


def machine_memory() -> float:
    """Bytes of memory of the machine, or of the container that this process runs in."""
    total = float(psutil.virtual_memory().total)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup 2 and 1
        with contextlib.suppress(OSError, ValueError):
            total = min(total, float(Path("/sys/fs/cgroup", name).read_text()))
    return total


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _open(path: Path) -> int:
    """The file, emptied; the null device where it cannot be had."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o644)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def _adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent ends, so that none escapes :meth:`close`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
