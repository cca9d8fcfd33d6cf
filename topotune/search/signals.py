"""Ctrl-C and its kin: the first drains and saves, the second aborts."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from topotune.search.book import Book

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GROUP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Handles SIGINT, SIGTERM and SIGHUP while a search runs, and restores what was there.

    Before a search has begun a signal ends the command at once, by KeyboardInterrupt. A SIGHUP
    that is ignored, as under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._book: Book | None = None
        self._held = 0
        self._caught = ""
        self._terminals: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        self._terminals = tuple(fd for fd in (0, 1, 2) if os.isatty(fd))
        self.install()
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
        """Put the first signal off until the block's end, where it must not be cut in two."""
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
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            self._leave_closed_terminals()
        if self._caught or (self._book is None and not self._held):
            raise KeyboardInterrupt(name)
        # Nothing is printed here: the handler may have interrupted a print.
        self._caught = name
        if self._book is not None:
            self._book.stop(f"stopped by {name}")

    def _leave_closed_terminals(self) -> None:
        """Let what is still printed go nowhere: a write to a closed terminal is an error."""
        for fd in self._terminals:
            if not os.isatty(fd):
                discard(fd)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """What is started inside inherits SIGHUP and SIGTERM blocked, as Ray does it for SIGINT.

    A shell that closes, ``timeout`` or a service manager signal the whole process group: Ray's
    own processes must outlive that, so that the driver can drain; it ends them itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unshield() -> None:
    """Take these signals again in this thread and in what it starts: a user's code, in a worker,
    ends its own processes by them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)


def discard(*descriptors: int) -> None:
    """Let what is written to these file descriptors go nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in descriptors:
        os.dup2(nowhere, fd)
    os.close(nowhere)
