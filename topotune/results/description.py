"""Descriptions in MLflow: of a search (how it stands, the best trial, links, the leaderboard), and
of a trial (how it ended, its parameters, curve and config).

MLflow folds a description after some lines, so that what most people look for comes first. Links
are written as ``(topotune:KIND/NUMBER)``: only the sender of the text knows the runs' addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from topotune.records import TrialSummary
from topotune.results.leaderboard import Leaderboard, valued
from topotune.results.ranking import last_value
from topotune.results.text import markdown, number, parameter
from topotune.results.yamltext import dump_yaml

LINKED_TRIALS = 10
"""Trials of the front and of the table that are links: each takes from the length that MLflow
allows."""
CURVE_POINTS = 24
"""Epochs of a trial's curves that its description shows."""
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
        f"[trial {trial.number}](topotune:trial/{trial.number}), "
        f"{markdown(valued(trial, board.objectives, ways=True))}"
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


def figures(trial: TrialSummary) -> str:
    """The objectives' values of a trial, or the last one known; empty where there are none."""
    known = (last_value(trial, i) for i in range(max(len(trial.values), len(trial.curves))))
    return ", ".join(number(value) for value in known if value is not None)


def describe_trial(trial: TrialSummary, objectives: Mapping[str, str]) -> str:
    """Markdown for the tag ``mlflow.note.content`` of a trial's run.

    Args:
        trial: one that has ended.
        objectives: metric name to "maximize" or "minimize", the first objective first.
    """
    names = ", ".join(f"{name} ({direction})" for name, direction in objectives.items())
    ended = f"{trial.epochs} epochs, {trial.device_seconds:.1f} device-seconds"
    reason = ". ".join(part for part in ("; ".join(trial.violated), trial.reason) if part)
    lines = [
        f"**{trial.state}**, {markdown(names)}: {figures(trial) or 'no value'}; {ended}. "
        f"[Curves](topotune:metrics/{trial.number}), [files](topotune:files/{trial.number})",
    ]
    if trial.params:  # in one line: MLflow folds what follows
        pairs = (f"**{markdown(k)}** {markdown(parameter(v))}" for k, v in trial.params.items())
        lines.append(" · ".join(pairs))
    if reason:
        lines.append(markdown(reason))
    if any(trial.curves):
        lines += ["### By epoch", _curves(trial, list(objectives))]
    if trial.spec:
        config = dump_yaml(dict(trial.spec)).rstrip()
        lines += ["### Config, for `topotune train`", f"```yaml\n{config}\n```"]
    return "\n\n".join(lines)


def _curves(trial: TrialSummary, objectives: Sequence[str]) -> str:
    """A table of the objectives at most ``CURVE_POINTS`` epochs, the last one among them."""
    epochs = sorted(set().union(*trial.curves))
    every = -(-len(epochs) // CURVE_POINTS)
    shown = epochs[::-1][::every][::-1]
    rows = [["epoch", *map(str, shown)], [":---", *["---:"] * len(shown)]]
    for name, curve in zip(objectives, trial.curves, strict=False):
        if curve:
            cells = (number(curve[epoch]) if epoch in curve else "" for epoch in shown)
            rows.append([markdown(name), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
