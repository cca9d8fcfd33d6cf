"""The leaderboard of a search: ranked trials as JSON, Markdown or rows of a terminal table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from topotune.records import TrialSummary
from topotune.results.ranking import (
    counts,
    is_eligible,
    is_finished,
    last_value,
    pareto_fronts,
    rank,
)
from topotune.results.text import clean, markdown, number, parameter, spread, strict_json

_TRACEBACK = re.compile(r" \(traceback: (.+?)\)(?=\)?$)")
_OVERHEADS = {
    "overhead_vs_adam": ("vs adam", "fused Adam's"),
    "overhead_vs_bptt": ("vs bptt", "the same network's by backpropagation through its relaxation"),
}
"""What a training step costs over another way to train: its column's title, and over what."""
_UNRANKED = "- where a trial cannot be best: it did not finish, or breaks a constraint"
_FRONT = "1 where no other trial is as good in every objective and better in one; 2 without those"
_UNFINISHED = "in brackets the last known value of a trial that did not finish"
_COST = "time of a training step over {}, median (interquartile range)"
_SECONDS = "seconds that a trial held a device, all its attempts together"
_LONGEST = 160
"""Characters of a cell of Markdown, such as a reason."""
_NAMED = 8
"""Trials of a front that one line names."""


@dataclass(frozen=True)
class Column:
    """A column of the table, in the order of the trials.

    Attributes:
        title: its title.
        cells: one a trial; control characters are made visible, nothing else is escaped.
        right: numbers stand on the right.
        spare: 0 for what a table always shows; of the rest, the highest goes first where there
            is no room.
        legend: sentences that a reader needs to read it.
    """

    title: str
    cells: tuple[str, ...]
    right: bool = True
    spare: int = 0
    legend: tuple[str, ...] = ()


def legend(columns: Iterable[Column]) -> list[str]:
    """What a reader of a table needs to know, a line each; nothing about what explains itself."""
    titles: dict[str, list[str]] = {}
    for column in columns:
        for text in column.legend:
            titles.setdefault(text, []).append(column.title)
    return [clean(f"{', '.join(names)}: {text}") for text, names in titles.items()]


def standing(front: Sequence[TrialSummary], objectives: Mapping[str, str]) -> str:
    """The best so far in one line; empty without any.

    Args:
        front: the best trial, or with several objectives the whole Pareto front.
        objectives: metric name to "maximize" or "minimize", the first objective first.
    """
    if not front:
        return ""
    if len(objectives) == 1:
        return f"best {valued(front[0], objectives)} (trial {front[0].number})"
    numbers = [str(trial.number) for trial in front[:_NAMED]]
    more = f" and {len(front) - _NAMED} more" if len(front) > _NAMED else ""
    reach = []
    for index, (name, direction) in enumerate(objectives.items()):
        pick, word = (max, "up to") if direction == "maximize" else (min, "down to")
        top = pick(front, key=lambda trial: trial.values[index])
        value = f"{number(top.values[index])}{spread(top.metrics, name)}"
        reach.append(f"{clean(name)} {word} {value}")
    return f"front of {len(front)} (trials {', '.join(numbers)}{more}): {', '.join(reach)}"


def valued(trial: TrialSummary, objectives: Mapping[str, str], ways: bool = False) -> str:
    """A finished trial's objectives, names and values, with ``ways`` also their directions."""
    return ", ".join(
        f"{clean(name)} {number(value)}{spread(trial.metrics, name)}{f' ({way})' if ways else ''}"
        for (name, way), value in zip(objectives.items(), trial.values, strict=True)
    )


@dataclass(frozen=True)
class Leaderboard:
    """All trials of a search in order, as JSON, Markdown or columns of a table.

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
        """The first trial of the front; None if no trial may be called best."""
        return next(iter(self.front), None)

    @property
    def front(self) -> tuple[TrialSummary, ...]:
        """The trials of the Pareto front, in order; with one objective the best alone."""
        several = len(self.objectives) > 1
        front = tuple(t for t in self.trials if self.fronts.get(t.number) == 1)
        return front if several else front[:1]

    def top(self, count: int) -> tuple[TrialSummary, ...]:
        """The best ``count`` trials that may be called best; fewer if there are fewer."""
        return tuple(t for t in self.trials if t.number in self.fronts)[:count]

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

    def columns(self, limit: int | None = None) -> list[Column]:
        """The table of the first ``limit`` trials, None for all.

        A figure in brackets is the last known one of a trial that did not finish; ``-`` in the
        first column marks a trial that cannot be best.
        """
        trials = self.trials[:limit]
        ranked = [trial.number in self.fronts for trial in trials]
        places = [str(place) if ok else "-" for place, ok in enumerate(ranked, start=1)]
        found = [Column("rank", tuple(places), legend=() if all(ranked) else (_UNRANKED,))]
        if len(self.objectives) > 1:
            fronts = (str(self.fronts.get(trial.number, "-")) for trial in trials)
            found.append(Column("front", tuple(fronts), spare=1, legend=(_FRONT,)))
        found.append(Column("trial", tuple(str(trial.number) for trial in trials)))
        states = (clean(trial.state, 12) for trial in trials)
        found.append(Column("state", tuple(states), right=False, spare=2))
        found += [self._objective(index, trials) for index in range(len(self.objectives))]
        found.append(Column("epochs", tuple(str(trial.epochs) for trial in trials), spare=4))
        for name in self.varied:
            cells = (parameter(t.params[name]) if name in t.params else "" for t in trials)
            found.append(Column(name, tuple(cells)))
        for name, (title, other) in _OVERHEADS.items():
            if name in self.objectives or all(name not in trial.metrics for trial in self.trials):
                continue
            costs = (_ratio(trial, name) for trial in trials)
            found.append(Column(title, tuple(costs), spare=3, legend=(_COST.format(other),)))
        seconds = (f"{trial.device_seconds:.1f}" for trial in trials)
        found.append(Column("device-s", tuple(seconds), spare=5, legend=(_SECONDS,)))
        reasons = (clean(_reason(trial)) for trial in trials)
        return [*found, Column("reason", tuple(reasons), right=False, spare=6)]

    def _objective(self, index: int, trials: Sequence[TrialSummary]) -> Column:
        name = list(self.objectives)[index]
        meaning = {_COST.format(_OVERHEADS[name][1]): None} if name in _OVERHEADS else {}
        cells = []
        for trial in trials:
            if is_finished(trial, list(self.objectives.values())):
                cells.append(f"{number(trial.values[index])}{spread(trial.metrics, name, '')}")
                continue
            known = last_value(trial, index)
            known = trial.metrics.get(name) if known is None else known
            cells.append("" if known is None else f"({number(known)})")
            if known is not None:
                meaning[_UNFINISHED] = None
        return Column(name, tuple(cells), legend=tuple(meaning))

    @property
    def tracebacks(self) -> dict[int, str]:
        """Where the traceback of a trial is, of those that have one; no row of the table has room
        for a path."""
        found = {trial.number: _TRACEBACK.search(trial.reason) for trial in self.trials}
        return {number: match[1] for number, match in found.items() if match}

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
            "front": [trial.number for trial in self.front],
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
        """A heading, the counts, the best trial or the whole front, the table and its legend."""
        head = [f"# Leaderboard of {markdown(self.search)}", markdown(self.summary) + "."]
        if len(self.objectives) == 1 and self.best is not None:
            best = valued(self.best, self.objectives, ways=True)
            head.append(markdown(f"Best: trial {self.best.number}, {best}."))
        elif self.front:
            lines = [
                f"- trial {t.number}: {markdown(valued(t, self.objectives, ways=True))}"
                for t in self.front
            ]
            head += [f"Front of {len(lines)}:", "\n".join(lines)]
        else:
            head.append("No trial finished within the constraints.")
        places = [f"Traceback of trial {n}: {markdown(p)}" for n, p in self.tracebacks.items()]
        tail = [self.markdown_table(), self.markdown_legend(), *places]
        return "\n\n".join([*head, *tail]) + "\n"

    def markdown_legend(self) -> str:
        """How to read the table, as a list."""
        return "\n".join(f"- {markdown(line)}" for line in legend(self.columns()))

    def markdown_table(
        self, max_chars: int | None = None, cell: Callable[[int, str], str] = lambda _, text: text
    ) -> str:
        """The table alone.

        Args:
            max_chars: leave out the last rows so that the text stays within this length; a
                line says how many. The head alone may exceed a very small limit.
            cell: from a row's place (0 the first) and its trial's number as text, that cell's
                Markdown.
        """
        columns = self.columns()
        trial = next(i for i, column in enumerate(columns) if column.title == "trial")
        head = [
            _line([column.title for column in columns]),
            _line(["---:" if column.right else ":---" for column in columns], raw=True),
        ]
        body = []
        for place, row in enumerate(zip(*(column.cells for column in columns), strict=True)):
            cells = [markdown(clean(text, _LONGEST)) for text in row]
            cells[trial] = cell(place, cells[trial])
            body.append(_line(cells, raw=True))
        room = math.inf if max_chars is None else max_chars - 60 - sum(len(x) + 1 for x in head)
        kept = 0
        while kept < len(body) and room >= len(body[kept]) + 1:
            room -= len(body[kept]) + 1
            kept += 1
        rest = len(body) - kept
        tail = [f"\n{rest} more trials are left out here."] if rest else []
        return "\n".join([*head, *body[:kept], *tail]) + "\n"


def _ratio(trial: TrialSummary, name: str) -> str:
    ratio = trial.metrics.get(name)
    return "" if ratio is None else f"{ratio:.2f}{spread(trial.metrics, name, '')}"


def _reason(trial: TrialSummary) -> str:
    broken = "breaks " + "; ".join(trial.violated) if trial.violated else ""
    return ". ".join(part for part in (broken, _TRACEBACK.sub("", trial.reason)) if part)


def _line(cells: Sequence[str], raw: bool = False) -> str:
    return "| " + " | ".join(cell if raw else markdown(cell) for cell in cells) + " |"
