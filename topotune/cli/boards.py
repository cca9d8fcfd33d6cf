"""Prints a leaderboard and the best config of a search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from topotune.results.text import clean, parameter

if TYPE_CHECKING:
    from rich.console import Console

    from topotune.results.leaderboard import Leaderboard


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


def print_best(out: Console, board: Leaderboard) -> None:
    """The best trial and its parameters, one a line, as a search file would hold them."""
    best = board.best
    if best is None:
        out.print("No trial has finished that may be called best.", markup=False)
        return
    pairs = zip(board.objectives, best.values, strict=True)
    figures = ", ".join(f"{clean(name)} {value:.4f}" for name, value in pairs)
    overhead = best.metrics.get("overhead_vs_adam")
    if overhead is not None:
        default = best.metrics.get("overhead_vs_adam_default", float("nan"))
        figures += f", step time {overhead:.2f}x fused Adam, {default:.2f}x default Adam"
    out.print(f"\nBest: trial {best.number}, {figures}", markup=False)
    for name, value in best.params.items():
        out.print(f"  {clean(name)}: {parameter(value)}", markup=False)
