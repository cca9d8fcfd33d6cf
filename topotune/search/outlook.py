"""How a search stands, for whoever watches: its counts, the best so far, and when it may end."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from topotune.config import SearchConfig
from topotune.config_rules import planned_trials
from topotune.records import Outcome, TrialSummary
from topotune.search.view import RunningTrial, SearchView

if TYPE_CHECKING:
    from topotune.search.book import Book


class Outlook:
    """Counts the trials that end, and keeps the best of them and their pace.

    Args:
        config: the search.
        finished: rows of trials that had ended before this session.
    """

    def __init__(self, config: SearchConfig, finished: Iterable[TrialSummary]) -> None:
        self._config = config
        self._counts: Counter[str] = Counter()
        self._best: TrialSummary | None = None
        for row in finished:
            self._take(row)
        self._session_started = time.monotonic()
        self._session_ended = 0

    def ended(self, row: TrialSummary) -> None:
        """A trial ended in this session."""
        self._session_ended += 1
        self._take(row)

    def _take(self, row: TrialSummary) -> None:
        """Count a row, and keep the best by the first objective among complete rows that break no
        constraint."""
        self._counts[row.state] += 1
        if row.state != Outcome.COMPLETE or row.violated or not row.values:
            return
        if math.isnan(row.values[0]):
            return
        sign = 1.0 if self._config.objective[0].direction == "maximize" else -1.0
        if self._best is None or sign * row.values[0] > sign * self._best.values[0]:
            self._best = row

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
                None if math.isnan(live.value) else live.value,
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
            best=self._best,
            running=running,
            device_seconds=book.ledger.device_seconds,
            wall_seconds=book.ledger.wall_seconds,
            eta_seconds=self._eta(book),
            waiting=waiting,
            tracking=tracking,
            headline=self._config.objective[0].metric,
        )

    def _eta(self, book: Book) -> float | None:
        left = book.store.left
        if not self._session_ended or left is None:
            return None
        pace = (time.monotonic() - self._session_started) / self._session_ended
        return pace * (left + len(book.live) / 2)
