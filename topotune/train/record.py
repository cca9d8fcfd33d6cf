"""What of a trial must outlive its worker, besides the state that training goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from topotune.errors import CheckpointError
from topotune.records import EpochReport
from topotune.tracking.entries import Body, Entry, Metrics, Series, Start, from_payload, to_payload
from topotune.train.overhead import Overhead
from topotune.train.trace import step_traces, thinned


@dataclass(frozen=True)
class TrialRecord:
    """A trial's history as its checkpoint holds it.

    Its stamps are those of the worker that took them, so that a record that is sent again, by the
    next worker or from the checkpoint of a dead one, is the same.

    Attributes:
        start: the resolved parameters, and where and with what the trial last began.
        overhead: as measured before the first epoch.
        history: all finished epochs, in order.
    """

    start: Start
    overhead: Overhead
    history: tuple[EpochReport, ...]

    def entries(self) -> tuple[Body, ...]:
        """What MLflow shows of the trial besides its epochs."""
        overhead = Metrics(self.overhead.metrics, 0, self.overhead.timestamp_ms)
        return (self.start, overhead) if overhead.values else (self.start,)

    def last_series(self, folder: Path) -> tuple[Series, ...]:
        """The thinned steps of the last epoch, which may not be reported yet, from the file in the
        trial's folder that was written before the checkpoint; none where it cannot be read.
        """
        if not self.history:
            return ()
        try:
            columns = step_traces(folder).read(self.history[-1].epoch)
        except CheckpointError:
            return ()
        return (Series(thinned(columns), self.history[-1].timestamp_ms),)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return {
            "start": to_payload(Entry(None, self.start)),
            "overhead": self.overhead.to_dict(),
            "history": [report.to_dict() for report in self.history],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            OutboxError, ValueError, KeyError, TypeError, AttributeError: the data are another's.
        """
        start = from_payload(data["start"]).body
        if not isinstance(start, Start):
            raise ValueError(f"expected the start of a trial, got {type(start).__name__}")
        history = tuple(EpochReport.from_dict(report) for report in data["history"])
        return cls(start, Overhead.from_dict(data["overhead"]), history)
