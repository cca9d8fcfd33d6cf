"""How a search stands, for whoever watches: its counts, the best so far, and when it may end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from topotune.config.models import SearchConfig
from topotune.config.rules import planned_trials
from topotune.records import TrialSummary
from topotune.results.ranking import is_eligible, pareto_fronts
from topotune.search.view import RunningTrial, SearchView

if TYPE_CHECKING:
    from topotune.search.drive.book import Book


class Outlook:
    """Counts the trials that end, and keeps the best of them and their pace.

    Args:
        config: the search.
        finished: rows of trials that had ended before this session.
    """

    def __init__(self, config: SearchConfig, finished: Iterable[TrialSummary]) -> None:
        self._config = config
        self._objectives = {o.metric: o.direction for o in config.objective}
        self._counts: Counter[str] = Counter()
        self._front: list[TrialSummary] = []
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
        self._counts[row.state] += 1
        directions = list(self._objectives.values())
        if not is_eligible(row, directions):
            return
        known = [*self._front, row]
        fronts = pareto_fronts([trial.values for trial in known], directions)
        self._front = [trial for trial, front in zip(known, fronts, strict=True) if front == 1]
        if len(directions) == 1:
            del self._front[1:]  # of equal ones the first

    def view(self, book: Book, phase: str, waiting: str = "", tracking: str = "") -> SearchView:
        """A snapshot to show.

        Args:
            book: the search's, for what is in flight.
            phase: "starting", "running", "draining" or "done".
            waiting: why something waits; empty if nothing does.
            tracking: one line on the tracking server.
        """
        running = tuple(
            RunningTrial(
                number,
                live.epoch,
                tuple(live.metrics.get(name) for name in self._objectives),
                live.params,
                number in book.holding,
            )
            for number, live in book.live.items()
        )
        return SearchView(
            name=self._config.name,
            phase=phase,
            counts={**self._counts, "RUNNING": len(book.holding)},
            total=planned_trials(self._config),
            epochs=self._config.budget.epochs,
            front=tuple(self._front),
            running=running,
            device_seconds=book.ledger.device_seconds,
            wall_seconds=book.ledger.wall_seconds,
            eta_seconds=self._eta(book),
            waiting=waiting,
            tracking=tracking,
            objectives=self._objectives,
        )

    def _eta(self, book: Book) -> float | None:
        left = book.store.left
        if not self._session_ended or left is None:
            return None
        pace = (time.monotonic() - self._session_started) / self._session_ended
        return pace * (left + len(book.live) / 2)
