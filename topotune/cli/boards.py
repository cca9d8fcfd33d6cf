"""Prints a leaderboard and the best config of a search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from topotune.results.text import clean, parameter

if TYPE_CHECKING:
    from rich.console import Console

    from topotune.results.leaderboard import Leaderboard


_OVERHEADS = {
    "overhead_vs_adam": "fused Adam",
    "overhead_vs_adam_default": "default Adam",
    "overhead_vs_bptt": "BPTT",
}
"""What a training step was timed against."""
_MOST_PLACES = 10
"""Paths of tracebacks that are listed below a table."""


def print_board(out: Console, board: Leaderboard, limit: int) -> None:
    """The table of the first ``limit`` trials, and the counts of all."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title=None)
    for title, side in zip(board.columns, board.justify, strict=True):
        table.add_column(title, justify="right" if side == "right" else "left", no_wrap=True)
    for row in board.rows[:limit]:
        table.add_row(*row)
    out.print(table)
    rest = len(board.trials) - limit
    more = f" ({rest} more rows: topotune status {clean(board.search)})" if rest > 0 else ""
    out.print(f"{board.summary}{more}", markup=False)
    shown = {trial.number for trial in board.trials[:limit]}
    places = [item for item in board.tracebacks.items() if item[0] in shown]
    for number, place in places[:_MOST_PLACES]:
        out.print(f"Traceback of trial {number}: {clean(place)}", markup=False, soft_wrap=True)
    if len(places) > _MOST_PLACES:
        again = f"topotune logs {clean(board.search)} --trial NUMBER"
        out.print(f"{len(places) - _MOST_PLACES} more tracebacks: {again}", markup=False)


def print_best(out: Console, board: Leaderboard) -> None:
    """The best trial and its parameters, one a line, as a search file would hold them."""
    best = board.best
    if best is None:
        out.print("No trial has finished that may be called best.", markup=False)
        return
    pairs = zip(board.objectives, best.values, strict=True)
    figures = ", ".join(f"{clean(name)} {value:.4f}" for name, value in pairs)
    costs = [
        f"{best.metrics[name]:.2f}x {label}"
        for name, label in _OVERHEADS.items()
        if name in best.metrics
    ]
    if costs:
        figures += f", step time {', '.join(costs)}"
    out.print(f"\nBest: trial {best.number}, {figures}", markup=False)
    for name, value in best.params.items():
        out.print(f"  {clean(name)}: {parameter(value)}", markup=False)
