"""The watchdog of a worker: it ends its own process when a trial hangs or takes too much memory.

Why a trial's process ended stands in ``crash.txt`` in the trial's folder, which is empty while all
is well: the traceback of a hang (written by a thread in C, so that it works even where a library
holds Python's lock), the line of Python under a fatal signal, or the memory that was taken. The
driver reads it (:mod:`topotune.search.deaths`). Its modification time is the trial's sign of life:
the driver ends a process that shows none and cannot end itself, such as a frozen one.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psutil

CRASH_FILE = "crash.txt"
MEMORY_PREFIX = "Memory: "
FROZEN_NOTE = "Frozen\n"
"""What the driver leaves in the crash file of a process that could not end itself."""
EXIT_CODE = 71
"""Exit code of a worker that ended itself for its memory."""
MEMORY_EVERY = 1.0
AUTO_SHARE = 0.9
"""Share of the machine's memory that ``limits.memory: auto`` allows."""
_PR_SET_CHILD_SUBREAPER = 36


class Guard:
    """Watches one trial in this process, while :meth:`watching`.

    Args:
        folder: the trial's folder.
        stall: seconds without a beat after which the process ends; None for no limit.
        memory: bytes of resident memory, children included, above which it ends; "auto" for most
            of the machine's; None for no limit.
    """

    def __init__(
        self, folder: Path, stall: float | None, memory: float | Literal["auto"] | None
    ) -> None:
        self._stall = stall
        self._memory = AUTO_SHARE * machine_memory() if memory == "auto" else memory
        # Each beat starts a thread in C, so not every one of them.
        self._every = 5.0 if stall is None else min(stall / 20, 5.0)
        self._armed = 0.0
        self._before = set(psutil.Process().children(recursive=True))
        self._over = threading.Event()
        self._busy = threading.Event()
        self._file = _open(folder)
        faulthandler.enable(self._file)
        _adopt_orphans()
        threading.Thread(target=self._watch_memory, name="memory guard", daemon=True).start()

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
        now = time.monotonic()
        if now - self._armed < self._every:
            return
        self._armed = now
        if self._stall is not None:
            faulthandler.dump_traceback_later(self._stall, exit=True, file=self._file)
        with contextlib.suppress(OSError):  # a full disk stops nothing here
            os.utime(self._file)

    def close(self) -> None:
        """The trial is over: end what it has left running."""
        self._over.set()
        faulthandler.disable()
        os.close(self._file)
        left = set(psutil.Process().children(recursive=True)) - self._before
        if not left:
            return
        gc.collect()  # first the owners, so that a data loader ends its own processes in peace
        for child in left:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(left, timeout=2)

    def _watch_memory(self) -> None:
        limit = self._memory
        while limit is not None and not self._over.wait(MEMORY_EVERY):
            if not self._busy.is_set():
                continue
            # Pages that a fork shares count in each process; only where it matters are they told
            # apart, which is slow.
            if resident(shared=True) > limit and (taken := resident(shared=False)) > limit:
                text = f"{MEMORY_PREFIX}{_gib(taken)} resident, limit {_gib(limit)}\n"
                with contextlib.suppress(OSError):
                    os.write(self._file, text.encode())
                    faulthandler.dump_traceback(self._file)
                os._exit(EXIT_CODE)


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


def _open(folder: Path) -> int:
    """The crash file, emptied; the null device where it cannot be had."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / CRASH_FILE, flags, 0o644)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def _adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent ends, so that none escapes :meth:`close`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
