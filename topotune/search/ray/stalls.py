"""Ends workers that can no longer end themselves: frozen ones, those that a library hangs in
without giving Python's lock back, and all that outstay a stop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.tune.experiment import Trial

from topotune.search.ray.watchdog import FROZEN_NOTE, GUARD_FILE, HANG_FILE

LOOK_EVERY = 2.0


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
        if self._patience is None or now - self._last < LOOK_EVERY:
            return
        passed = min(now - self._last, 2 * LOOK_EVERY)
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


def end_worker(trial: Trial) -> None:
    """Kill a trial's worker process, if it has one."""
    actor = trial.temporary_state.ray_actor
    if actor is not None:
        ray.kill(actor)


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
