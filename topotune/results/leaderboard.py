"""The leaderboard of a search: ranked trials as JSON, Markdown or rows of a terminal table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from topotune.records import TrialSummary
from topotune.results.ranking import (
    best,
    counts,
    is_eligible,
    is_finished,
    last_value,
    pareto_fronts,
    rank,
    top,
)
from topotune.results.text import clean, markdown, number, parameter, rich_text, strict_json

__all__ = ["Leaderboard", "best", "counts", "rank", "top"]

_TRACEBACK = re.compile(r" \(traceback: (.+?)\)(?=\)?$)")
_OVERHEADS = {"overhead_vs_adam": "vs adam", "overhead_vs_bptt": "vs bptt"}
"""What a training step costs over another way to train, and its column's title."""


@dataclass(frozen=True)
class Leaderboard:
    """All trials of a search in order, as JSON, Markdown or rows of a table.

    Attributes:
        search: the search's name.
        objectives: metric name to "maximize" or "minimize", the first objective first.
        trials: every trial in the order of :func:`rank`.
        fronts: trial number to Pareto front, for the trials that may be called best.
    """

    search: str
    objectives: Mapping[str, str]
    trials: tuple[TrialSummary, ...]
    fronts: Mapping[int, int]

    @classmethod
    def of(cls, trials: Iterable[TrialSummary], search: str, objectives: Mapping[str, str]) -> Self:
        """Rank the trials of a search.

        Raises:
            ConfigError: no objective, or a direction that is neither of the two words.
        """
        directions = list(objectives.values())
        ranked = rank(trials, directions)
        eligible = [t for t in ranked if is_eligible(t, directions)]
        fronts = pareto_fronts([t.values for t in eligible], directions)
        numbers = (t.number for t in eligible)
        return cls(search, objectives, tuple(ranked), dict(zip(numbers, fronts, strict=True)))

    @property
    def best(self) -> TrialSummary | None:
        """The first trial if it may be called best."""
        return self.trials[0] if self.trials and self.trials[0].number in self.fronts else None

    @property
    def counts(self) -> dict[str, int]:
        """How many trials each state has."""
        return counts(self.trials)

    @property
    def device_seconds(self) -> float:
        """What the ledger charged to all trials together, in seconds of one device."""
        return math.fsum(trial.device_seconds for trial in self.trials)

    @property
    def summary(self) -> str:
        """One line: how many trials ended how, and what they cost."""
        parts = [f"{n} {state.lower()}" for state, n in self.counts.items() if n]
        total = f"{len(self.trials)} trial" + ("" if len(self.trials) == 1 else "s")
        ended = f": {', '.join(parts)}" if parts else ""
        return clean(f"{total}{ended}; {self.device_seconds:.1f} device-seconds")

    @property
    def varied(self) -> tuple[str, ...]:
        """Names of the parameters that differ between trials (of a single trial: all of them)."""
        names = dict.fromkeys(
            name for trial in sorted(self.trials, key=lambda t: t.number) for name in trial.params
        )
        if len(self.trials) == 1:
            return tuple(names)
        absent = "\0"  # a conditional parameter that a trial does not have counts as a difference
        return tuple(
            name
            for name in names
            if len({repr(trial.params.get(name, absent)) for trial in self.trials}) > 1
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Column titles, harmless in a rich table as they are; see :attr:`rows`."""
        return tuple(rich_text(clean(title, 24)) for title in self._titles())

    @property
    def justify(self) -> tuple[Literal["left", "right"], ...]:
        """ "left" or "right" for each column, as rich's ``Table.add_column`` takes it."""
        left = {"state", "reason"}
        return tuple("left" if title in left else "right" for title in self._titles())

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """One row a trial, best first; markup is escaped, so a rich table takes them as they are.

        A figure in brackets is the last known one of a trial that did not finish; ``-`` in the
        first column marks a trial that cannot be best.
        """
        return tuple(tuple(rich_text(cell) for cell in row) for row in self.plain_rows())

    def plain_rows(self, width: int = 60) -> list[list[str]]:
        """The rows for plain text, control characters made visible and nothing else escaped.

        Args:
            width: characters that a reason may take.
        """
        varied, overheads, multiple = self.varied, self._overheads(), len(self.objectives) > 1
        rows = []
        for place, trial in enumerate(self.trials, start=1):
            ranked = trial.number in self.fronts
            row = [str(place) if ranked else "-"]
            if multiple:
                row.append(str(self.fronts[trial.number]) if ranked else "-")
            row += [str(trial.number), clean(trial.state, 12)]
            row += self._objective_cells(trial)
            row.append(str(trial.epochs))
            row += [parameter(trial.params[n]) if n in trial.params else "" for n in varied]
            for name in overheads:
                ratio = trial.metrics.get(name)
                row.append("" if ratio is None else f"{ratio:.2f}")
            broken = "breaks " + "; ".join(trial.violated) if trial.violated else ""
            reason = ". ".join(part for part in (broken, _TRACEBACK.sub("", trial.reason)) if part)
            rows.append([*row, f"{trial.device_seconds:.1f}", clean(reason, width)])
        return rows

    @property
    def tracebacks(self) -> dict[int, str]:
        """Where the traceback of a trial is, of those that have one; no row of the table has room
        for a path."""
        found = {trial.number: _TRACEBACK.search(trial.reason) for trial in self.trials}
        return {number: match[1] for number, match in found.items() if match}

    def _titles(self) -> list[str]:
        front = ["front"] if len(self.objectives) > 1 else []
        overheads = [_OVERHEADS[name] for name in self._overheads()]
        names = ["rank", *front, "trial", "state", *self.objectives, "epochs", *self.varied]
        return [*names, *overheads, "device-s", "reason"]

    def _overheads(self) -> list[str]:
        """The overheads that any trial has."""
        return [name for name in _OVERHEADS if any(name in t.metrics for t in self.trials)]

    def _objective_cells(self, trial: TrialSummary) -> list[str]:
        if is_finished(trial, list(self.objectives.values())):
            return [number(value) for value in trial.values]
        known: Sequence[float | None] = trial.values or (last_value(trial),)
        cells = ["" if value is None else f"({number(value)})" for value in known]
        return (cells + [""] * len(self.objectives))[: len(self.objectives)]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in order, with the rank of each trial; strict JSON types only."""
        winner = self.best
        trials = []
        for place, trial in enumerate(self.trials, start=1):
            ranked = trial.number in self.fronts
            extra = {"rank": place if ranked else None, "front": self.fronts.get(trial.number)}
            trials.append({**extra, **trial.to_dict()})
        board = {
            "search": self.search,
            "objectives": [{"metric": m, "direction": d} for m, d in self.objectives.items()],
            "best": winner.number if winner else None,
            "counts": self.counts,
            "device_seconds": self.device_seconds,
            "trials": trials,
        }
        strict: dict[str, Any] = strict_json(board, "leaderboard")
        return strict

    def to_json(self) -> str:
        """Strict JSON text; non-finite numbers as the words "nan", "inf" and "-inf"."""
        return json.dumps(self.to_dict(), allow_nan=False, indent=2) + "\n"

    def to_markdown(self) -> str:
        """A heading, the counts, the best trial and the table."""
        best_line = "No trial finished within the constraints."
        if (winner := self.best) is not None:
            best_line = f"Best: trial {winner.number}, {self.figures(winner)}."
        head = [f"# Leaderboard of {markdown(self.search)}", markdown(self.summary) + "."]
        places = [f"Traceback of trial {n}: {markdown(p)}" for n, p in self.tracebacks.items()]
        return "\n\n".join([*head, markdown(best_line), self.markdown_table(), *places])

    def figures(self, trial: TrialSummary) -> str:
        """A finished trial's objectives in words."""
        pairs = zip(self.objectives.items(), trial.values, strict=True)
        return ", ".join(f"{name} {number(v)} ({direction})" for (name, direction), v in pairs)

    def markdown_table(
        self, max_chars: int | None = None, cell: Callable[[int, str], str] = lambda _, text: text
    ) -> str:
        """The table alone.

        Args:
            max_chars: leave out the last rows so that the text stays within this length; a
                line says how many. The head alone may exceed a very small limit.
            cell: told a row's place from 0 and its trial's number as text; gives that cell's
                Markdown.
        """
        titles = self._titles()
        column = titles.index("trial")
        head = [
            _line(titles),
            _line(["---:" if side == "right" else ":---" for side in self.justify], raw=True),
        ]
        body = []
        for place, row in enumerate(self.plain_rows(width=160)):
            cells = [markdown(text) for text in row]
            cells[column] = cell(place, cells[column])
            body.append(_line(cells, raw=True))
        room = math.inf if max_chars is None else max_chars - 60 - sum(len(x) + 1 for x in head)
        kept = 0
        while kept < len(body) and room >= len(body[kept]) + 1:
            room -= len(body[kept]) + 1
            kept += 1
        rest = len(body) - kept
        tail = [f"\n{rest} more trials are left out here."] if rest else []
        return "\n".join([*head, *body[:kept], *tail]) + "\n"


def _line(cells: Sequence[str], raw: bool = False) -> str:
    return "| " + " | ".join(cell if raw else markdown(cell) for cell in cells) + " |"
