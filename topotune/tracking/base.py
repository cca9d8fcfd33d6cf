"""What a trial needs from a tracker; adapters live beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from topotune.records import EpochReport, Outcome, Value


class Tracker(Protocol):
    """Receives one trial's record. Every call may be repeated with the same arguments: a
    resumed trial replays what it knows, and the tracker keeps each thing once."""

    def start(self, params: Mapping[str, Value], tags: Mapping[str, str]) -> None:
        """The trial begins, or begins again: its resolved parameters and its provenance."""

    def epoch(self, report: EpochReport) -> None:
        """An epoch is finished and checkpointed. A known epoch number is ignored."""

    def metrics(self, values: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        """Values that belong to the trial and to no epoch, such as its measured overhead."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """A finished file to keep with the trial."""

    def end(self, outcome: Outcome, reason: str) -> None:
        """How the trial ended."""


class NullTracker:
    """Keeps nothing."""

    def start(self, params: Mapping[str, Value], tags: Mapping[str, str]) -> None:
        """Ignored."""

    def epoch(self, report: EpochReport) -> None:
        """Ignored."""

    def metrics(self, values: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        """Ignored."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Ignored."""

    def end(self, outcome: Outcome, reason: str) -> None:
        """Ignored."""
