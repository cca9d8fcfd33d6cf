"""What a person sees while a search runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from topotune.records import Outcome, TrialSummary
from topotune.redaction import redact
from topotune.results.text import clean, parameter, rich_text

if TYPE_CHECKING:
    from topotune.search.view import SearchView

LINE_EVERY = 15.0
"""Seconds between two progress lines where there is no terminal."""


def duration(seconds: float) -> str:
    """Seconds as ``41s``, ``3m05s`` or ``2h10m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def progress_line(view: SearchView) -> str:
    """One line: how many ended how, the best so far, time spent and left."""
    counts = view.counts
    ended = sum(count for state, count in counts.items() if state in set(Outcome))
    total = f"/{view.total}" if view.total is not None else ""
    parts = [f"{ended}{total} trials"]
    parts += [
        f"{counts[state]} {state.lower()}"
        for state in ("RUNNING", *Outcome)
        if counts.get(str(state))
    ]
    if view.best is not None:
        parts.append(f"best {view.headline} {view.best.values[0]:.4f} (trial {view.best.number})")
    parts.append(f"{duration(view.wall_seconds)} elapsed")
    if view.eta_seconds is not None and view.phase == "running":
        parts.append(f"about {duration(view.eta_seconds)} left")
    if view.phase == "draining":
        parts.append("draining")
    if view.phase == "done":
        parts.append("saving and sending what is left")
    if view.waiting:
        parts.append(view.waiting)
    return ", ".join(parts)


def ended_line(trial: TrialSummary, headline: str) -> str:
    """One line on a trial that ended."""
    value = trial.metrics.get(headline)
    shown = "" if value is None else f"{clean(headline, 24)} {value:.4f}, "
    reason = f": {clean(trial.reason, 200)}" if trial.reason else ""
    return (
        f"trial {trial.number} {trial.state} {shown}{trial.epochs} epochs, "
        f"{trial.device_seconds:.1f} device-s{reason}"
    )


class PlainLines:
    """Prints a line for each trial that ends, and a progress line now and then."""

    def __init__(self, headline: str) -> None:
        self._headline, self._next = headline, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Print the line at once."""
        print(clean(redact(text), 2000), flush=True)

    def tick(self, view: SearchView) -> None:
        """Print a progress line if the last one is old."""
        if time.monotonic() >= self._next and view.phase != "done":
            self._next = time.monotonic() + LINE_EVERY
            self.note(progress_line(view))

    def ended(self, trial: TrialSummary) -> None:
        """Print how it ended."""
        self.note(ended_line(trial, self._headline))


class LiveTable:
    """Redraws a table of the running trials, with notes and ended trials scrolling above."""

    def __init__(self, headline: str) -> None:
        from rich.console import Console
        from rich.live import Live

        self._headline = headline
        self._console = Console(highlight=False)
        self._view: SearchView | None = None
        self._seen = 0.0
        self._live = Live(
            get_renderable=self._now,
            console=self._console,
            refresh_per_second=4,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        """Print above the table."""
        self._console.print(rich_text(clean(redact(text), 2000)))

    def tick(self, view: SearchView) -> None:
        """Show this from the next redraw on."""
        self._view, self._seen = view, time.monotonic()

    def _now(self) -> Any:
        """Drawn by a thread: the clock goes on while the driver waits for what drains or closes."""
        if self._view is None:
            return ""
        since = time.monotonic() - self._seen
        return self._draw(replace(self._view, wall_seconds=self._view.wall_seconds + since))

    def ended(self, trial: TrialSummary) -> None:
        """Print above the table."""
        self.note(ended_line(trial, self._headline))

    def _draw(self, view: SearchView) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        counts = view.counts
        ended = sum(count for state, count in counts.items() if state in set(Outcome))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("trial", "epoch", view.headline, "parameters"):
            table.add_column(rich_text(clean(title, 24)))
        for trial in view.running:
            shown = ", ".join(f"{clean(k, 24)}={parameter(v)}" for k, v in trial.params.items())
            value = "" if trial.value is None else f"{trial.value:.4f}"
            table.add_row(
                str(trial.number), f"{trial.epoch}/{view.epochs}", value, rich_text(shown)
            )
        lines: list[Any] = [Text(clean(f"{view.name}: {progress_line(view)}"), style="bold")]
        if view.total:
            lines.append(ProgressBar(total=view.total, completed=ended, width=60))
        if view.running:
            lines.append(table)
        lines.append(Text(clean(view.tracking), style="dim"))
        return Group(*lines)


def listener_for(headline: str) -> PlainLines | LiveTable:
    """The live table where standard output is a terminal, else plain lines."""
    return LiveTable(headline) if sys.stdout.isatty() else PlainLines(headline)
