"""What of a trial must outlive its worker, besides the state that training goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from topotune.records import EpochReport
from topotune.tracking.entries import Body, Entry, Metrics, Start, from_payload, to_payload
from topotune.train.overhead import Overhead


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
            SpoolError, ValueError, KeyError, TypeError, AttributeError: the data are another's.
        """
        start = from_payload(data["start"]).body
        if not isinstance(start, Start):
            raise ValueError(f"expected the start of a trial, got {type(start).__name__}")
        history = tuple(EpochReport.from_dict(report) for report in data["history"])
        return cls(start, Overhead.from_dict(data["overhead"]), history)
