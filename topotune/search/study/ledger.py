"""Device seconds: what a search really spent, failed, pruned and repeated work included."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from topotune.errors import SpoolError
from topotune.search.place.folder import write_bytes
from topotune.search.study.trialfile import read_copies
from topotune.tracking.lines import decode, encode

_log = logging.getLogger(__name__)

SAVE_EVERY = 1.0
MAX_GAP = 60.0
"""A longer pause between two ticks is a driver that was stopped, not work; it is charged as this.

A machine's sleep is not charged at all: the monotonic clock stands still in it. Whoever waits for
long with workers running ticks meanwhile (see Patience).
"""


_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError),
    SpoolError,
)
"""What a damaged ledger can raise while it is taken apart."""


class Ledger:
    """Integrates "trials holding a device" over time by a monotonic clock.

    A trial is charged from the moment it gets its device until it gives it back, whatever becomes
    of it, so start-up, repeated epochs and lost work all count. The file is rewritten about once
    a second: a killed driver loses at most that.

    Args:
        path: the ledger's file; read if it exists.
        devices: devices that one trial holds (GPUs, or 1 for its CPU slot).
        fence: called before each write; raises if another driver has taken the search over.

    Attributes:
        alone: trials that share no device, and are charged for a whole one.
        wall_seconds: of all sessions.
        trials: device seconds of each trial.
        device_seconds: of all trials together.
    """

    def __init__(
        self, path: Path, devices: float, fence: Callable[[], None] = lambda: None
    ) -> None:
        self._path, self._devices, self._fence = path, devices, fence
        self.alone: set[int] = set()
        data = read_ledger(path)
        self.wall_seconds: float = data["wall_seconds"]
        self.trials: dict[int, float] = data["trials"]
        self.device_seconds = sum(self.trials.values())
        self._last = self._saved = time.monotonic()

    def tick(self, running: Iterable[int]) -> None:
        """Charge the time since the last tick to the trials that held a device in it."""
        now = time.monotonic()
        elapsed = min(now - self._last, MAX_GAP)
        self._last = now
        self.wall_seconds += elapsed
        for number in running:
            devices = max(self._devices, 1.0) if number in self.alone else self._devices
            self.trials[number] = self.trials.get(number, 0.0) + elapsed * devices
            self.device_seconds += elapsed * devices
        if now - self._saved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the file.

        Raises:
            ResourceError: the disk is full or the folder cannot be written.
        """
        self._saved = time.monotonic()
        data = {
            "wall_seconds": round(self.wall_seconds, 3),
            "trials": {str(number): round(value, 3) for number, value in self.trials.items()},
        }
        write_bytes(self._path, encode(data), _previous(self._path), self._fence)


def read_ledger(path: Path) -> dict[str, Any]:
    """The ledger's numbers: ``wall_seconds`` and ``trials`` (number to device seconds).

    A damaged file is reported in the log and the one before it used, which is about a second
    older; where both are damaged, what the trials' own records say.
    """
    for name in (path, _previous(path)):
        try:
            content = name.read_bytes()
            data = json.loads(content) if content[:1] == b"{" else decode(content.rstrip(b"\n"))
            return {
                "wall_seconds": float(data["wall_seconds"]),
                "trials": {int(number): float(value) for number, value in data["trials"].items()},
            }
        except FileNotFoundError:
            continue
        except _UNREADABLE as error:
            _log.warning("%s: the ledger is damaged (%s); looking for the one before", name, error)
    return _from_records(path.parent)


def _previous(path: Path) -> Path:
    return path.with_name("ledger.previous.json")


def _from_records(root: Path) -> dict[str, Any]:
    """What ended trials were charged, and the time in which any of them ran."""
    trials: dict[int, float] = {}
    spans = []
    for number, copy in read_copies(root).items():
        start, complete = copy.trial.datetime_start, copy.trial.datetime_complete
        if start is not None and complete is not None:
            trials[number] = float(copy.trial.user_attrs.get("end", {}).get("device_seconds", 0.0))
            spans.append((start, complete))
    if spans:
        _log.warning(
            "%s: counted anew from the records of %d trials", root / "ledger.json", len(spans)
        )
    wall, reached = 0.0, datetime.min
    for start, complete in sorted(spans):
        wall += max((complete - max(start, reached)).total_seconds(), 0.0)
        reached = max(reached, complete)
    return {"wall_seconds": wall, "trials": trials}
