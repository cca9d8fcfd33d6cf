"""How a search stands: its counts, the best so far, and when it may end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from topotune.config.models import SearchConfig
from topotune.records import TrialSummary
from topotune.results.ranking import is_eligible, pareto_fronts


class Outlook:
    """Counts the trials that end, and keeps the best of them and their pace.

    Args:
        config: the search.
        finished: rows of trials that had ended before this session.

    Attributes:
        objectives: metric to direction.
        counts: trials of each outcome.
        front: the best of them.
    """

    def __init__(self, config: SearchConfig, finished: Iterable[TrialSummary]) -> None:
        self.objectives = config.directions
        self.counts: Counter[str] = Counter()
        self.front: list[TrialSummary] = []
        for row in finished:
            self._take(row)
        self._session_started = time.monotonic()
        self._session_ended = 0

    def ended(self, row: TrialSummary) -> None:
        """A trial ended in this session."""
        self._session_ended += 1
        self._take(row)

    def _take(self, row: TrialSummary) -> None:
        """Count a row, and keep the front of those that may be called best."""
        self.counts[row.state] += 1
        directions = list(self.objectives.values())
        if not is_eligible(row, directions):
            return
        known = [*self.front, row]
        fronts = pareto_fronts([trial.values for trial in known], directions)
        self.front = [trial for trial, front in zip(known, fronts, strict=True) if front == 1]
        if len(directions) == 1:
            del self.front[1:]  # of equal ones the first

    def eta(self, left: float) -> float | None:
        """Seconds until so many trials more have ended; None while none has in this session."""
        if not self._session_ended:
            return None
        pace = (time.monotonic() - self._session_started) / self._session_ended
        return pace * left
