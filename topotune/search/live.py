"""What the driver leaves for other processes to read while it lives: why trials wait, what runs.

It stands in ``live.json`` in the search's folder, is no record of anything, and counts only while
the driver that wrote it holds the search.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from topotune.errors import TopotuneError
from topotune.results.text import clean
from topotune.search.place.folder import write_bytes
from topotune.search.view import SearchView

WRITE_EVERY = 3.0
MAX_BYTES = 1_000_000
"""A larger file is not one of ours."""
_SHOWN = 8


class LiveFile:
    """Keeps the file up to date: written when something changed, every few seconds at most.

    Args:
        path: the file.
        fence: called before each change; raises if another driver has taken the search over.
    """

    def __init__(self, path: Path, fence: Callable[[], None] = lambda: None) -> None:
        self._path, self._fence = path, fence
        self._shown: dict[str, Any] = {}
        self._next = -math.inf

    def show(self, view: SearchView) -> None:
        """Write what is new.

        Raises:
            ResourceError: the disk is full or the folder cannot be written.
            LeaseLostError: another driver has taken the search over.
        """
        now = time.monotonic()
        if now < self._next:
            return
        shown = {
            "driver": _this_driver(),
            "phase": view.phase,
            "waiting": view.waiting,
            "running": [
                {"number": trial.number, "epoch": trial.epoch}
                for trial in view.running
                if trial.holds
            ],
        }
        if shown == self._shown:
            return
        self._shown, self._next = shown, now + WRITE_EVERY
        text = json.dumps({**shown, "at": round(time.time(), 3)}) + "\n"
        write_bytes(self._path, text.encode(), fence=self._fence)

    def remove(self) -> None:
        """The driver ends."""
        with contextlib.suppress(OSError, TopotuneError):  # no reader takes it without its driver
            self._fence()
            self._path.unlink()


@dataclass(frozen=True)
class Live:
    """What a living driver last said.

    Attributes:
        at: when, in seconds since 1970.
        phase: "running" or "draining".
        waiting: why trials wait; empty while none does.
        running: number and epochs done of each trial that holds a device.
    """

    at: float
    phase: str
    waiting: str
    running: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, path: Path, holder: str | None) -> Self | None:
        """What the holder of a search's lease last said; None if that is nothing.

        Args:
            path: the file.
            holder: who drives the search, as :func:`topotune.search.place.lease.lease_holder` says.
        """
        try:
            with path.open("rb") as file:
                raw = json.loads(file.read(MAX_BYTES))
            driver = str(raw["driver"])
            if holder is None or not (holder == driver or holder.startswith(f"{driver},")):
                return None
            running = tuple((int(trial["number"]), int(trial["epoch"])) for trial in raw["running"])
            at, phase, waiting = float(raw["at"]), str(raw["phase"]), str(raw["waiting"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None
        return cls(at, phase, waiting, running)

    def lines(self) -> list[str]:
        """For a person."""
        found = []
        if self.running:
            under_way = [f"trial {number} after epoch {epoch}" for number, epoch in self.running]
            more = f" and {len(under_way) - _SHOWN} more" if len(under_way) > _SHOWN else ""
            found.append(f"{clean(self.phase)}: {', '.join(under_way[:_SHOWN])}{more}")
        if self.waiting:
            found.append(clean(self.waiting))
        return found

    def to_dict(self) -> dict[str, Any]:
        """For a script."""
        running = [{"number": number, "epoch": epoch} for number, epoch in self.running]
        return {
            "at": self.at,
            "phase": self.phase,
            "waiting": self.waiting,
            "running": running,
        }


def _this_driver() -> str:
    """As :mod:`topotune.search.place.lease` names a holder."""
    return f"pid {os.getpid()} on {socket.gethostname()}"
