"""A search's own description in MLflow: how it stands, the best trial, links, the leaderboard.

MLflow folds a description after some lines, so that what most people look for comes first. Links
are written as ``(topotune:KIND/NUMBER)``: only whoever sends the text knows the runs' addresses.
"""

from __future__ import annotations

from topotune.results.leaderboard import Leaderboard
from topotune.results.text import markdown

LINKED_TRIALS = 10
"""Rows of the table whose trial is a link: each takes from the length that MLflow allows."""
_TABLE = 5000
_ABOUT = 800
_LINKS = (
    "[All trials as a table](topotune:trials)",
    "[their curves](topotune:curves)",
    "[files: search.yaml, plots, whole leaderboard](topotune:artifacts)",
)


def describe(board: Leaderboard, outcome: str, about: str = "", next_command: str = "") -> str:
    """Markdown for the tag ``mlflow.note.content``.

    Args:
        board: the trials.
        outcome: RUNNING, COMPLETE, INTERRUPTED or FAILED.
        about: what the search file says of the search.
        next_command: what to type next; empty for nothing.
    """
    winner = board.best
    best = "no trial has finished within the constraints"
    if winner is not None:
        link = f"[trial {winner.number}](topotune:trial/{winner.number})"
        best = f"best: {link}, {markdown(board.figures(winner))}"
    lines = [
        f"**{outcome}**, {best}. {markdown(board.summary)}.",
        " · ".join(_LINKS),
    ]
    if about.strip():
        lines.append(markdown(about[:_ABOUT]))
    if next_command:
        lines.append(f"To go on: `{next_command}`")

    def cell(place: int, number: str) -> str:
        linked = place < LINKED_TRIALS and number.isdecimal()
        return f"[{number}](topotune:trial/{number})" if linked else number

    if board.trials:
        lines += ["### Leaderboard", board.markdown_table(_TABLE, cell)]
    return "\n\n".join(lines)
