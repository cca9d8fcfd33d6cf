"""Device seconds: what a search really spent, failed, pruned and repeated work included."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from topotune.errors import SearchFolderError
from topotune.search.folder import write_text

SAVE_EVERY = 1.0
MAX_GAP = 60.0
"""A longer pause between two ticks is a suspended machine, not work; it is charged as this."""


_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError),
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
    """

    def __init__(self, path: Path, devices: float) -> None:
        self._path, self._devices = path, devices
        data = read_ledger(path)
        self.wall_seconds: float = data["wall_seconds"]
        self.trials: dict[int, float] = data["trials"]
        self._last = self._saved = time.monotonic()

    @property
    def device_seconds(self) -> float:
        """All trials together."""
        return sum(self.trials.values())

    def tick(self, running: Iterable[int]) -> None:
        """Charge the time since the last tick to the trials that held a device in it."""
        now = time.monotonic()
        elapsed = min(now - self._last, MAX_GAP)
        self._last = now
        self.wall_seconds += elapsed
        for number in running:
            self.trials[number] = self.trials.get(number, 0.0) + elapsed * self._devices
        if now - self._saved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the file."""
        self._saved = time.monotonic()
        data = {
            "wall_seconds": round(self.wall_seconds, 3),
            "trials": {str(number): round(value, 3) for number, value in self.trials.items()},
        }
        write_text(self._path, json.dumps(data) + "\n")


def read_ledger(path: Path) -> dict[str, Any]:
    """The ledger's numbers: ``wall_seconds`` and ``trials`` (number to device seconds)."""
    if not path.exists():
        return {"wall_seconds": 0.0, "trials": {}}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {
            "wall_seconds": float(data["wall_seconds"]),
            "trials": {int(number): float(value) for number, value in data["trials"].items()},
        }
    except _UNREADABLE as error:
        raise SearchFolderError(
            f"{path}: the ledger is damaged ({error}). Move it away to start counting from zero"
        ) from None
