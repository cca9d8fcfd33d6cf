"""Device seconds: what a search really spent, failed, pruned and repeated work included."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from topotune.search.study.rows import Spent

KEEP_EVERY = 1.0
KEEP_SHARE = 1 / 36_000
"""What is spent is kept once a second, and once in this share of the wall time where that is
longer: in the first ten hours the one, later the other, so that notes of it never fill a study."""
MAX_GAP = 60.0
"""A longer pause between two ticks is a driver that was stopped, not work; it is charged as this.

A machine's sleep is not charged at all: the monotonic clock stands still in it. Who waits for long
with workers running charges meanwhile (see Patience).
"""


class Ledger:
    """Integrates "trials holding a device" over time by a monotonic clock.

    A trial is charged from the moment it gets its device until it gives it back, whatever becomes
    of it, so start-up, repeated epochs and lost work all count. What is spent is kept in the study
    about once a second: a killed driver loses at most that.

    Args:
        spent: in the sessions before this one.
        keep: called with what is spent by now, to store it.
        devices: devices that one trial holds (GPUs, or 1 for its CPU slot).

    Attributes:
        alone: trials that share no device, and are charged for a whole one.
        wall_seconds: of all sessions.
        trials: device seconds of each trial.
        device_seconds: of all trials together.
    """

    def __init__(self, spent: Spent, keep: Callable[[Spent], None], devices: float = 1.0) -> None:
        self._keep, self._devices = keep, devices
        self.alone: set[int] = set()
        self.wall_seconds, self.trials = spent.wall_seconds, dict(spent.trials)
        self.device_seconds = sum(self.trials.values())
        self._last = self._kept = time.monotonic()

    def charge(self, running: Iterable[int]) -> None:
        """Charge the time since the last call to the trials that held a device in it."""
        now = time.monotonic()
        elapsed = min(now - self._last, MAX_GAP)
        self._last = now
        self.wall_seconds += elapsed
        for number in running:
            devices = max(self._devices, 1.0) if number in self.alone else self._devices
            self.trials[number] = self.trials.get(number, 0.0) + elapsed * devices
            self.device_seconds += elapsed * devices

    def tick(self, running: Iterable[int]) -> None:
        """As :meth:`charge`; what is spent is kept if it is time.

        Raises:
            ResourceError: the study cannot be written.
            LeaseLostError: another driver has taken the search over.
        """
        self.charge(running)
        if self._last - self._kept >= max(KEEP_EVERY, KEEP_SHARE * self.wall_seconds):
            self.save()

    def save(self) -> None:
        """Keep what is spent.

        Raises:
            ResourceError, LeaseLostError: as :meth:`tick`.
        """
        self._kept = time.monotonic()
        self._keep(Spent(self.wall_seconds, self.trials))
