"""Ctrl-C and its kin: the first drains and saves, the second aborts."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from topotune.search.drive.book import Book

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
START_SECONDS = 8.0
"""How long Ray may go on starting after the first signal."""
STOP_SECONDS = 15.0
"""How long a stop may take, whatever it waits for; with what the sweeper needs, all is gone within
20 seconds."""
ABORT_SECONDS = 2.0
"""How long the end may take after the second signal."""
_LOOK_SECONDS = 0.1
_INTERRUPTED = 130


def what_is_kept(name: str, begun: bool, place: str = "") -> str:
    """What a search that is aborted leaves, and what to type next.

    Args:
        name: the search.
        begun: whether it is on disk.
        place: the option that finds it there, as it is typed.
    """
    if begun:
        return f"every finished epoch is kept. To go on: topotune resume {name}{place}"
    return "the search has not begun and nothing is kept. To begin it: the same command"


class Interrupts:
    """Handles SIGINT, SIGTERM and SIGHUP while a search runs, and restores what was there.

    Before a search has begun a signal ends the command at once, by KeyboardInterrupt. A SIGHUP
    that is ignored, as under nohup, stays ignored. A stop that takes too long, because a library
    lets no handler run or the machine is overloaded, ends as an abort does: the process is left
    with exit code 130 there and then. That loses no more than a kill does, which is nothing.

    Attributes:
        kept: what an abort leaves and how to go on, in words; empty while that is not known.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self.kept = ""
        self._book: Book | None = None
        self._held = 0
        self._caught = ""
        self._since = self._again = math.inf  # of the first signal and the second
        self._over = threading.Event()
        self._terminals: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        self._terminals = tuple(fd for fd in (0, 1, 2) if os.isatty(fd))
        self.install()
        if self._before:
            with shielded():  # a handler must find the main thread, not this one
                threading.Thread(target=self._watch, name="interrupts", daemon=True).start()
        return self

    def install(self) -> None:
        """Take the signals over; again after Ray, which sets handlers of its own."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            before = signal.signal(number, self._handle)
            self._before.setdefault(number, before)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Put the first signal off until the block's end, where it must not be cut in two; the
        second one ends the process soon. To be used inside of :func:`shielded`."""
        self._held += 1
        try:
            yield
        except SystemExit:  # Ray's own handler of SIGTERM, set half-way through its start
            raise KeyboardInterrupt("SIGTERM") from None
        finally:
            self._held -= 1
            self.install()
        if self._caught and not self._held:
            raise KeyboardInterrupt(self._caught)

    def drain(self, book: Book | None) -> None:
        """From now on the first signal stops this search in good order; without one, at once."""
        self._book = book

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        if self._again < math.inf or (self._book is None and not self._held):
            raise KeyboardInterrupt(self._caught)
        # Nothing is printed here: the handler may have interrupted a print.
        if self._book is not None:
            self._book.stop(f"stopped by {self._caught}")

    def _note(self, number: int) -> None:
        """Take a signal down."""
        if number == signal.SIGHUP:
            self._leave_closed_terminals()
        if self._caught:
            self._again = min(self._again, time.monotonic())
        else:
            self._caught, self._since = signal.Signals(number).name, time.monotonic()

    def _watch(self) -> None:
        """In a thread: see the signals that are held, and that a stop comes to its end."""
        while not self._over.wait(0.0 if self._held else _LOOK_SECONDS):
            if self._held:  # then they are blocked, and reach no handler
                caught = signal.sigtimedwait(tuple(self._before), _LOOK_SECONDS)
                if caught is not None:
                    self._note(caught.si_signo)
                    if self._again == math.inf:
                        _write(f"{self._caught}: ends as soon as Ray is up; once more to abort")
            first = START_SECONDS if self._held else STOP_SECONDS
            if time.monotonic() > min(self._since + first, self._again + ABORT_SECONDS):
                _write(f"aborted: {self.kept}" if self.kept else "aborted")
                os._exit(_INTERRUPTED)

    def _leave_closed_terminals(self) -> None:
        """Let what is still printed go nowhere: a write to a closed terminal is an error."""
        for fd in self._terminals:
            if not os.isatty(fd):
                discard(fd)


def _write(text: str) -> None:
    """Print a line on standard error, whatever the interrupted main thread holds of it."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """What is started inside, processes and threads, inherits the signals blocked.

    A shell that closes, ``timeout`` or a service manager signal the whole process group: Ray's
    own processes must outlive that, so that the driver can drain; it ends them itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unshield() -> None:
    """Take these signals again in this thread and in what it starts: a user's code, in a worker,
    ends its own processes by them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGHUP))


def discard(*descriptors: int) -> None:
    """Let what is written to these file descriptors go nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in descriptors:
        os.dup2(nowhere, fd)
    os.close(nowhere)
