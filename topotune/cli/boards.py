"""Prints a leaderboard and the best config of a search, as wide as the terminal is.

What a person came for is never cut: rank, trial, objectives and searched values. Where a terminal
has no room for the whole table, other columns are left out, and then the table is transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from topotune.cli.options import say_whole, shown
from topotune.results.leaderboard import legend, valued
from topotune.results.text import clean, parameter, spread

if TYPE_CHECKING:
    from rich.console import Console

    from topotune.records import TrialSummary
    from topotune.results.leaderboard import Column, Leaderboard
    from topotune.search.status import SearchStatus

_OVERHEADS = {
    "overhead_vs_adam": "fused Adam",
    "overhead_vs_adam_default": "default Adam",
    "overhead_vs_bptt": "BPTT",
}
"""What a training step was timed against."""
_GAP = 2
"""Characters between two columns."""
_MOST_PLACES = 10
"""Paths of tracebacks that are listed below a table."""


def print_status(out: Console, status: SearchStatus, limit: int) -> None:
    """How a search stands, the first ``limit`` trials of its table, and the best."""
    for line in (status.line(), *(status.live.lines() if status.live else ())):
        say_whole(out, shown(line))
    out.print()
    print_board(out, status.board, limit)
    print_best(out, status.board)


def print_board(out: Console, board: Leaderboard, limit: int, where: str = "") -> None:
    """The table of the first ``limit`` trials, how to read it, and the counts of all.

    Args:
        out: where to.
        board: the trials.
        limit: rows at most.
        where: the option that finds the search, for a command that shows the rest.
    """
    *others, reason = board.columns(limit)
    shown = _fitting([*others, reason] if any(reason.cells) else others, out.width)
    if shown is None:
        _print_transposed(out, others)
        shown = others
    else:
        _print_table(out, shown)
    gone = [column.title for column in others if column not in shown]
    notes = legend(shown)
    if gone:
        notes.append(f"left out at {out.width} columns: {', '.join(gone)}; --json has them")
    if notes:
        out.print()
    for line in notes:
        say_whole(out, line, "dim")
    if reason not in shown:
        for line in _reasons(board.trials[:limit], reason):
            say_whole(out, line)
    say_whole(out, board.summary)
    if (rest := len(board.trials) - limit) > 0:
        say_whole(out, f"{rest} more rows: topotune status {clean(board.search)}{where}")
    _print_tracebacks(out, board, limit, where)


def _print_tracebacks(out: Console, board: Leaderboard, limit: int, where: str) -> None:
    shown = {trial.number for trial in board.trials[:limit]}
    places = [item for item in board.tracebacks.items() if item[0] in shown]
    for number, place in places[:_MOST_PLACES]:
        say_whole(out, f"Traceback of trial {number}: {clean(place)}")
    if len(places) > _MOST_PLACES:
        again = f"topotune logs {clean(board.search)} --trial NUMBER{where}"
        say_whole(out, f"{len(places) - _MOST_PLACES} more tracebacks: {again}")


def _fitting(columns: Sequence[Column], width: int) -> list[Column] | None:
    """The columns that a terminal has room for; None where it has too little for what must show."""
    kept = list(columns)
    while sum(map(_width, kept)) + _GAP * (len(kept) - 1) > width:
        widest = max(kept, key=lambda column: column.spare)
        if not widest.spare:
            return None
        kept.remove(widest)
    return kept


def _width(column: Column) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, (clean(column.title), *column.cells)))


def _print_table(out: Console, columns: Sequence[Column]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        title = Text(clean(column.title))
        table.add_column(title, justify="right" if column.right else "left", no_wrap=True)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, row))
    out.print(table)


def _print_transposed(out: Console, columns: Sequence[Column]) -> None:
    """A line a column of the table, and as many trials beside each other as there is room for."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    room = out.width - max(_width(column) for column in columns)
    trials = list(zip(*(column.cells for column in columns), strict=True))
    while trials:
        taken, used = 0, 0
        while taken < len(trials):
            used += _GAP + max(map(cell_len, trials[taken]))
            if taken and used > room:
                break
            taken += 1
        block, trials = trials[:taken], trials[taken:]
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="bold", overflow="fold")
        for _ in block:
            table.add_column(justify="right", overflow="fold")
        for column, row in zip(columns, zip(*block, strict=True), strict=True):
            table.add_row(Text(clean(column.title)), *map(Text, row))
        out.print(table)
        if trials:
            out.print()


def _reasons(trials: Sequence[TrialSummary], reason: Column) -> list[str]:
    """A line for each reason, with the trials that it is true of."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for trial, text in zip(trials, reason.cells, strict=True):
        if text:
            numbers.setdefault((clean(trial.state, 12), text), []).append(str(trial.number))
    return [
        f"{state} trial{'s' if len(found) > 1 else ''} {', '.join(found)}: {text}"
        for (state, text), found in numbers.items()
    ]


def print_best(out: Console, board: Leaderboard) -> None:
    """The best trial and its parameters, one a line, as a search file would hold them; with
    several objectives every trial of the Pareto front."""
    if not board.front:
        say_whole(out, "No trial has finished that may be called best.")
        return
    several = len(board.objectives) > 1
    out.print()
    if several:
        say_whole(
            out,
            f"Front of {len(board.front)}: no other trial is as good in every objective and "
            "better in one",
        )
    for trial in board.front:
        figures = valued(trial, board.objectives)
        costs = [
            f"{trial.metrics[name]:.2f}x {label}{spread(trial.metrics, name)}"
            for name, label in _OVERHEADS.items()
            if name in trial.metrics and name not in board.objectives
        ]
        if costs:
            figures += f", step time {', '.join(costs)}"
        pairs = [f"{clean(name)}: {parameter(value)}" for name, value in trial.params.items()]
        if several:
            say_whole(out, f"trial {trial.number}: {figures}", indent="  ")
            say_whole(out, ", ".join(pairs), indent="    ", first="    ")
            continue
        say_whole(out, f"Best: trial {trial.number}, {figures}")
        for pair in pairs:
            say_whole(out, pair, first="  ", indent="  ")
