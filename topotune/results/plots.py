"""Figures of a whole search; those of one trial are in ``trace.py`` and ``relaxation.py``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topotune.records import Outcome
from topotune.results import figure as fig
from topotune.results.leaderboard import Leaderboard
from topotune.results.ranking import is_finished, last_value
from topotune.results.text import figure_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUMBERED = 20
"""Trials of a front that have their numbers beside them; of more they would cover each other."""
_LOST = (Outcome.DIVERGED.value, Outcome.FAILED.value)
_STYLE = {
    Outcome.COMPLETE.value: (fig.BLUE, "complete", "o"),
    Outcome.PRUNED.value: (fig.ORANGE, "pruned", "v"),
    "RUNNING": (fig.GREY, "running", "s"),
    Outcome.DIVERGED.value: (fig.RED, "diverged", "x"),
    Outcome.FAILED.value: (fig.INK, "failed", "+"),
}


def plot_history(board: Leaderboard, png_path: Path, title: str = "") -> None:
    """Draw each objective against the trial number, with the best so far.

    Trials that did not finish stand at their last value; those that diverged or failed have no
    comparable one and are marked on the lower edge; one that breaks a constraint is hollow.

    Args:
        board: the search's trials and objectives.
        png_path: where to write; replaced only by a finished picture.
        title: shown above; any text.

    Raises:
        ResourceError: the picture cannot be written.
    """
    figure, axes = _panels(len(board.objectives), title)
    for index, axis in enumerate(axes):
        _draw_history(axis, board, index)
    _finish(figure, axes, "trial", "" if board.trials else "no trials yet")
    fig.save(figure, png_path)


def _draw_history(axis: Axes, board: Leaderboard, index: int) -> None:
    values = {t.number: v for t in board.trials if fig.drawable(v := last_value(t, index))}
    shown: list[float] = []
    for state, (colour, label, marker) in _STYLE.items():
        chosen = [t for t in board.trials if t.state == state]
        if state in _LOST:
            _mark_lost(axis, [t.number for t in chosen], colour, label, marker)
            continue
        for hollow in (False, True):
            part = [t for t in chosen if t.number in values and bool(t.violated) is hollow]
            if part:
                y = [values[t.number] for t in part]
                axis.scatter(
                    [t.number for t in part],
                    y,
                    s=22,
                    marker=marker,
                    facecolors="none" if hollow else colour,
                    edgecolors=colour,
                    linewidths=0.9,
                    label=label + (", breaks a constraint" if hollow else ""),
                    zorder=3,
                )
                shown += y
    if steps := _best_so_far(board, index):
        last = max(t.number for t in board.trials)
        x, best_y = [n for n, _ in steps] + [last], [v for _, v in steps] + [steps[-1][1]]
        axis.step(x, best_y, where="post", color=fig.INK, linewidth=1.2, label="best so far")
    _label_y(axis, list(board.objectives)[index], shown)


def plot_curves(board: Leaderboard, png_path: Path, title: str = "") -> None:
    """Draw every trial's objectives over its epochs, the best trial or the front highlighted.

    A dot ends each curve, so that trials of one epoch are seen too. An objective that no epoch
    reports, such as an overhead, has no panel.

    Args:
        board: the search's trials and objectives.
        png_path: where to write; replaced only by a finished picture.
        title: shown above; any text.

    Raises:
        ResourceError: the picture cannot be written.
    """
    lines = [
        {
            t.number: [(float(e), v) for e, v in sorted(t.curves[index].items()) if fig.drawable(v)]
            for t in board.trials
            if index < len(t.curves)
        }
        for index in range(len(board.objectives))
    ]
    drawn = [i for i, curves in enumerate(lines) if any(curves.values())]
    figure, axes = _panels(len(drawn) or 1, title)
    for index, axis in zip(drawn or [0], axes, strict=True):
        shown = _draw_curves(axis, board, lines[index])
        _label_y(axis, list(board.objectives)[index], shown)
    longest = max((x for curves in lines for line in curves.values() for x, _ in line), default=1.0)
    axes[0].set_xlim(0.5, longest + 0.5)
    _finish(figure, axes, "epoch", "" if drawn else "no epochs yet")
    fig.save(figure, png_path)


def _draw_curves(
    axis: Axes, board: Leaderboard, curves: Mapping[int, list[tuple[float, float]]]
) -> list[float]:
    """The curves of one objective; all values in them."""
    from matplotlib.collections import LineCollection

    front = board.front
    for state, (colour, label, _) in _STYLE.items():
        others = [t for t in board.trials if t.state == state and t not in front]
        lines = [line for t in others if (line := curves.get(t.number))]
        if lines:
            axis.add_collection(
                LineCollection(lines, colors=colour, linewidths=1.0, alpha=0.5, label=label)
            )
            ends_x, ends_y = zip(*(line[-1] for line in lines), strict=True)
            axis.scatter(ends_x, ends_y, s=9, c=colour, alpha=0.8, linewidths=0, zorder=3)
    label = f"best (trial {front[0].number})" if len(front) == 1 else f"front of {len(front)}"
    look: dict[str, Any] = {"linewidth": 2.0, "marker": "o", "markersize": 3.5, "zorder": 5}
    for trial in front:
        if line := curves.get(trial.number):
            axis.plot(*zip(*line, strict=True), color=fig.INK, label=label, **look)
            label = ""  # named once
    return [v for line in curves.values() for _, v in line]


def plot_front(board: Leaderboard, png_path: Path, title: str = "") -> None:
    """Draw the finished trials in the plane of every two objectives, the Pareto front highlighted.

    Of more than four objectives each is drawn over the first alone, to keep the picture legible.
    The trials of the front have their numbers beside them; one that breaks a constraint is hollow.

    Args:
        board: the search's trials, of two objectives or more.
        png_path: where to write; replaced only by a finished picture.
        title: shown above; any text.

    Raises:
        ResourceError: the picture cannot be written.
    """
    front, order = board.front, list(board.objectives)
    directions = list(board.objectives.values())
    finished = [
        t for t in board.trials if is_finished(t, directions) and all(map(fig.drawable, t.values))
    ]
    pairs = list(itertools.combinations(order, 2))
    pairs = pairs if len(order) <= 4 else pairs[: len(order) - 1]
    figure = fig.new_figure(3.6 * len(pairs), title)
    axes = list(figure.subplots(len(pairs), 1, squeeze=False)[:, 0])
    for axis, pair in zip(axes, pairs, strict=True):
        i, j = (order.index(name) for name in pair)
        groups = {
            ("complete", fig.BLUE, fig.BLUE): [t for t in finished if not t.violated],
            ("breaks a constraint", fig.BLUE, "none"): [t for t in finished if t.violated],
            (f"front of {len(front)}", fig.INK, fig.INK): [t for t in finished if t in front],
        }
        for (label, edge, face), group in groups.items():
            if group:
                x, y = zip(*((t.values[i], t.values[j]) for t in group), strict=True)
                axis.scatter(x, y, s=24, facecolors=face, edgecolors=edge, label=label, zorder=3)
        for trial in front if len(front) <= _NUMBERED else ():
            if trial in finished:
                place = (trial.values[i], trial.values[j])
                look = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
                axis.annotate(str(trial.number), place, **look)
        ways = {name: f"{name} ({board.objectives[name]})" for name in pair}
        axis.set_xlabel(figure_text(ways[pair[0]], 60), fontsize=9, parse_math=False)
        _label_y(axis, ways[pair[1]], [t.values[j] for t in finished])
        if not finished:
            fig.note(axis, "no trial has finished")
    _legend(figure, axes)
    fig.save(figure, png_path)


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure of panels under each other that share x."""
    figure = fig.new_figure(3.6 if count == 1 else 2.4 * count + 0.8, title)
    return figure, list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def _mark_lost(axis: Axes, numbers: list[int], colour: str, label: str, marker: str) -> None:
    """Crosses on the lower edge, whatever the scale of the values is."""
    if numbers:
        axis.scatter(
            numbers,
            [0.0] * len(numbers),
            s=26,
            c=colour,
            marker=marker,
            linewidths=1.2,
            label=f"{label} (on the edge)",
            transform=axis.get_xaxis_transform(),
            clip_on=False,
            zorder=4,
        )


def _best_so_far(board: Leaderboard, index: int) -> list[tuple[int, float]]:
    """(trial number, an objective) wherever the best of the eligible trials improved."""
    better = max if list(board.objectives.values())[index] == "maximize" else min
    steps: list[tuple[int, float]] = []
    for trial in sorted(board.trials, key=lambda t: t.number):
        if trial.number not in board.fronts or not fig.drawable(value := trial.values[index]):
            continue
        if not steps or better(value, steps[-1][1]) != steps[-1][1]:
            steps.append((trial.number, value))
    return steps


def _label_y(axis: Axes, label: str, values: Sequence[float]) -> None:
    """The y axis of one panel, and its look."""
    fig.dress(axis)
    axis.set_ylabel(figure_text(label, 40), fontsize=9, parse_math=False)
    fig.set_y_scale(axis, values, decades=3)


def _finish(figure: Figure, axes: Sequence[Axes], x_label: str, empty: str) -> None:
    """The shared x axis, of whole numbers, and the legend."""
    from matplotlib.ticker import MaxNLocator

    axes[-1].set_xlabel(x_label, fontsize=9)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if empty:
        fig.note(axes[0], empty)
    _legend(figure, axes)


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Under the axes, where it cannot cover data; a label of several panels once."""
    named = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if named:
        look: dict[str, Any] = {"ncols": 4, "frameon": False, "fontsize": 8}
        figure.legend(named.values(), named.keys(), loc="outside lower center", **look)
