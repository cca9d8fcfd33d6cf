"""What a search looks like from outside while it runs: records for its displays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from topotune.records import TrialSummary, Value

BEGUN = "the search begins"
"""Noted by a driver that has checked everything: from here on the search is on disk."""


@dataclass(frozen=True)
class RunningTrial:
    """A trial in flight: its number, epochs done, the objectives' present values (None while not
    known) and its parameters, and whether it holds a device or waits for one."""

    number: int
    epoch: int
    values: tuple[float | None, ...]
    params: Mapping[str, Value]
    holds: bool = True


@dataclass(frozen=True)
class SearchView:
    """A snapshot of a search.

    Attributes:
        name: the search.
        phase: "starting", "running", "draining" or "done".
        counts: state to number of trials (COMPLETE, PRUNED, DIVERGED, FAILED, RUNNING).
        total: trials of the budget; None without a limit.
        epochs: epochs of a full trial.
        front: the best trial so far; with several objectives the Pareto front.
        running: the trials in flight.
        device_seconds: charged so far.
        wall_seconds: of all sessions.
        eta_seconds: estimate until the end; None while unknown.
        waiting: why something waits; empty if nothing does.
        tracking: one line on the tracking server.
        objectives: metric name to "maximize" or "minimize", the first objective first.
    """

    name: str
    phase: str
    counts: Mapping[str, int]
    total: int | None
    epochs: int
    front: tuple[TrialSummary, ...] = ()
    running: tuple[RunningTrial, ...] = ()
    device_seconds: float = 0.0
    wall_seconds: float = 0.0
    eta_seconds: float | None = None
    waiting: str = ""
    tracking: str = ""
    objectives: Mapping[str, str] = field(default_factory=dict)


class Listener(Protocol):
    """Watches a search; called in the driver's thread, so it must return quickly."""

    def note(self, text: str) -> None:
        """Something a person should know, one line."""

    def tick(self, view: SearchView) -> None:
        """About once a second."""

    def ended(self, trial: TrialSummary) -> None:
        """A trial ended."""


class SafeListener:
    """Passes everything on until the other side is gone (a closed terminal or pipe), then is
    silent: a search does not end with its display."""

    def __init__(self, listener: Listener) -> None:
        self._listener: Listener = listener

    def _call(self, call: Callable[[], None]) -> None:
        try:
            call()
        except (OSError, ValueError, RuntimeError):
            self._listener = SilentListener()

    def note(self, text: str) -> None:
        """Pass on."""
        self._call(lambda: self._listener.note(text))

    def tick(self, view: SearchView) -> None:
        """Pass on."""
        self._call(lambda: self._listener.tick(view))

    def ended(self, trial: TrialSummary) -> None:
        """Pass on."""
        self._call(lambda: self._listener.ended(trial))


class SilentListener:
    """Watches nothing."""

    def note(self, text: str) -> None:
        """Ignored."""

    def tick(self, view: SearchView) -> None:
        """Ignored."""

    def ended(self, trial: TrialSummary) -> None:
        """Ignored."""
