"""What a person sees while a search runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from topotune.cli.options import plain_table, say_whole
from topotune.records import Outcome, TrialSummary
from topotune.redaction import redact
from topotune.results.leaderboard import standing
from topotune.results.text import clean, number, parameter, spread

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
    if best := standing(view.front, view.objectives):
        parts.append(best)
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


def ended_line(trial: TrialSummary, objectives: Collection[str]) -> str:
    """One line on a trial that ended, with the last value of each objective."""
    figures = "".join(
        f"{clean(name)} {number(trial.metrics[name])}{spread(trial.metrics, name)}, "
        for name in objectives
        if name in trial.metrics
    )
    reason = f": {clean(trial.reason)}" if trial.reason else ""
    epochs = f"{trial.epochs} epoch{'' if trial.epochs == 1 else 's'}"
    return (
        f"trial {trial.number} {trial.state} {figures}{epochs}, "
        f"{trial.device_seconds:.1f} device-s{reason}"
    )


class PlainLines:
    """Prints a line for each trial that ends, and a progress line now and then."""

    def __init__(self, objectives: Collection[str]) -> None:
        self._objectives, self._next = objectives, 0.0

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
        self.note(ended_line(trial, self._objectives))


class LiveTable:
    """Redraws a table of the running trials, with notes and ended trials scrolling above."""

    def __init__(self, objectives: Collection[str]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._objectives = objectives
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
        say_whole(self._console, clean(redact(text), 2000))

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
        self.note(ended_line(trial, self._objectives))

    def _draw(self, view: SearchView) -> Any:
        from rich.console import Group
        from rich.padding import Padding
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        counts = view.counts
        ended = sum(count for state, count in counts.items() if state in set(Outcome))
        table = plain_table()
        one = len(view.objectives) == 1
        for title in ("trial", "epoch", *(view.objectives if one else ())):
            table.add_column(Text(clean(title)), no_wrap=True)
        table.add_column("parameters" if one else "objectives, parameters", overflow="fold")
        for trial in view.running:
            shown = ", ".join(f"{clean(k)}={parameter(v)}" for k, v in trial.params.items())
            values = ["" if value is None else number(value) for value in trial.values]
            if not one:  # columns of several would leave the parameters no room
                pairs = zip(view.objectives, values, strict=True)
                known = ", ".join(f"{clean(name)} {value}" for name, value in pairs if value)
                shown, values = f"{known}\n{shown}" if known else shown, []
            table.add_row(str(trial.number), f"{trial.epoch}/{view.epochs}", *values, Text(shown))
        lines: list[Any] = [Text(clean(f"{view.name}: {progress_line(view)}"), style="bold")]
        if view.total:
            bar = ProgressBar(total=view.total, completed=ended, width=60)
            lines.append(Padding(bar, 0))  # by itself it does not end its line
        if view.running:
            lines.append(table)
        lines.append(Text(clean(view.tracking), style="dim"))
        return Group(*lines)


def listener_for(objectives: Collection[str]) -> PlainLines | LiveTable:
    """The live table where standard output is a terminal, else plain lines."""
    return LiveTable(objectives) if sys.stdout.isatty() else PlainLines(objectives)
