"""A search's own description in MLflow: how it stands, the best trial, links, the leaderboard.

MLflow folds a description after some lines, so that what most people look for comes first. Links
are written as ``(topotune:KIND/NUMBER)``: only whoever sends the text knows the runs' addresses.
"""

from __future__ import annotations

from topotune.results.leaderboard import Leaderboard
from topotune.results.text import markdown

LINKED_TRIALS = 10
"""Trials of the front and of the table that are links: each takes from the length that MLflow
allows."""
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
    several = len(board.objectives) > 1
    best = [
        f"[trial {trial.number}](topotune:trial/{trial.number}), {markdown(board.figures(trial))}"
        for trial in board.front
    ]
    said = "no trial has finished within the constraints"
    if several and best:
        said = f"front of {len(best)}, listed below"
    elif best:
        said = f"best: {best[0]}"
    lines = [
        f"**{outcome}**, {said}. {markdown(board.summary)}.",
        " · ".join(_LINKS),
    ]
    if about.strip():
        lines.append(markdown(about[:_ABOUT]))
    if next_command:
        lines.append(f"To go on: `{next_command}`")

    front = [f"- {one}" for one in best[:LINKED_TRIALS]] if several else []
    if front:
        rest = [f"- {len(best) - len(front)} more"] if len(best) > len(front) else []
        lines += ["### Front", "\n".join(front + rest)]

    def cell(place: int, number: str) -> str:
        linked = place < LINKED_TRIALS - len(front) and number.isdecimal()
        return f"[{number}](topotune:trial/{number})" if linked else number

    if board.trials:
        legend = board.markdown_legend()
        room = _TABLE - len(legend) - sum(map(len, front))
        lines += ["### Leaderboard", legend, board.markdown_table(room, cell)]
    return "\n\n".join(lines)
