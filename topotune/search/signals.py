"""Ctrl-C and its kin: the first drains and saves, the second aborts."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from topotune.search.book import Book

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Handles SIGINT, SIGTERM and SIGHUP while a search runs, and restores what was there.

    Args:
        book: told to hand out nothing more.
    """

    def __init__(self, book: Book) -> None:
        self._book = book
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self.install()
        return self

    def install(self) -> None:
        """Take the signals over; again after Ray, which sets handlers of its own."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            before = signal.signal(number, self._handle)
            self._before.setdefault(number, before)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._book.stopping:
            raise KeyboardInterrupt(f"second {name}")
        # Nothing is printed here: the handler may have interrupted a print.
        self._book.stop(f"stopped by {name}")
