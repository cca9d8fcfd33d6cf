"""Figures of a whole search; those of one trial are in ``trace.py`` and ``relaxation.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topotune.records import Outcome, TrialSummary
from topotune.results import figure as fig
from topotune.results.ranking import best, check_directions, is_eligible, last_value
from topotune.results.relaxation import plot_relaxation
from topotune.results.text import figure_text
from topotune.results.trace import plot_trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_curves", "plot_history", "plot_relaxation", "plot_trace"]

_LOST = (Outcome.DIVERGED.value, Outcome.FAILED.value)
_STYLE = {
    Outcome.COMPLETE.value: (fig.BLUE, "complete", "o"),
    Outcome.PRUNED.value: (fig.ORANGE, "pruned", "v"),
    "RUNNING": (fig.GREY, "running", "s"),
    Outcome.DIVERGED.value: (fig.RED, "diverged", "x"),
    Outcome.FAILED.value: (fig.INK, "failed", "+"),
}


def plot_history(
    trials: Sequence[TrialSummary],
    png_path: Path,
    objectives: Mapping[str, str],
    title: str = "",
) -> None:
    """Draw the first objective against the trial number, with the best so far.

    Trials that did not finish stand at their last value; those that diverged or failed have no
    comparable one and are marked on the lower edge; one that breaks a constraint is hollow.

    Args:
        trials: in any order.
        png_path: where to write; replaced only by a finished picture.
        objectives: metric name to "maximize" or "minimize", the first objective first.
        title: shown above; any text.

    Raises:
        ConfigError: no objective, or a direction that is neither of the two words.
        ResourceError: the picture cannot be written.
    """
    metric, directions = _first(objectives)
    figure = fig.new_figure(3.6, title)
    axis = figure.subplots()
    values = {t.number: v for t in trials if fig.drawable(v := last_value(t))}
    shown: list[float] = []
    for state, (colour, label, marker) in _STYLE.items():
        chosen = [t for t in trials if t.state == state]
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
    steps = _best_so_far(trials, directions)
    if steps:
        last = max(t.number for t in trials)
        x, best_y = [n for n, _ in steps] + [last], [v for _, v in steps] + [steps[-1][1]]
        axis.step(x, best_y, where="post", color=fig.INK, linewidth=1.2, label="best so far")
    _finish(figure, axis, shown, "trial", metric, "no trials yet" if not trials else "")
    fig.save(figure, png_path)


def plot_curves(
    trials: Sequence[TrialSummary],
    png_path: Path,
    objectives: Mapping[str, str],
    title: str = "",
) -> None:
    """Draw every trial's first objective over its epochs, the best trial highlighted.

    A dot ends each curve, so that trials of one epoch are seen too.

    Args:
        trials: in any order.
        png_path: where to write; replaced only by a finished picture.
        objectives: metric name to "maximize" or "minimize", the first objective first.
        title: shown above; any text.

    Raises:
        ConfigError: no objective, or a direction that is neither of the two words.
        ResourceError: the picture cannot be written.
    """
    from matplotlib.collections import LineCollection

    metric, directions = _first(objectives)
    figure = fig.new_figure(3.6, title)
    axis = figure.subplots()
    curves = {
        t.number: [(float(e), v) for e, v in sorted(t.curve.items()) if fig.drawable(v)]
        for t in trials
    }
    winner = best(trials, directions)
    shown: list[float] = []
    for state, (colour, label, _) in _STYLE.items():
        others = [t for t in trials if t.state == state and t is not winner]
        lines = [curves[t.number] for t in others if curves[t.number]]
        if lines:
            axis.add_collection(
                LineCollection(lines, colors=colour, linewidths=1.0, alpha=0.5, label=label)
            )
            ends_x, ends_y = zip(*(line[-1] for line in lines), strict=True)
            axis.scatter(ends_x, ends_y, s=9, c=colour, alpha=0.8, linewidths=0, zorder=3)
        shown += [v for line in lines for _, v in line]
    if winner is not None and curves[winner.number]:
        x, y = zip(*curves[winner.number], strict=True)
        name = f"best (trial {winner.number})"
        look: dict[str, Any] = {"linewidth": 2.0, "marker": "o", "markersize": 3.5, "zorder": 5}
        axis.plot(x, y, color=fig.INK, label=name, **look)
        shown += y
    longest = max((line[-1][0] for line in curves.values() if line), default=1.0)
    axis.set_xlim(0.5, longest + 0.5)
    _finish(figure, axis, shown, "epoch", metric, "no epochs yet" if not shown else "")
    fig.save(figure, png_path)


def _first(objectives: Mapping[str, str]) -> tuple[str, list[str]]:
    """The first metric's name and all directions, checked."""
    directions = list(objectives.values())
    check_directions(directions)
    return next(iter(objectives)), directions


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


def _best_so_far(
    trials: Sequence[TrialSummary], directions: Sequence[str]
) -> list[tuple[int, float]]:
    """(trial number, first objective) wherever the best of the eligible trials improved."""
    better = max if directions[0] == "maximize" else min
    steps: list[tuple[int, float]] = []
    for trial in sorted(trials, key=lambda t: t.number):
        if is_eligible(trial, directions) and fig.drawable(trial.values[0]):
            value = trial.values[0]
            if not steps or better(value, steps[-1][1]) != steps[-1][1]:
                steps.append((trial.number, value))
    return steps


def _finish(
    figure: Figure, axis: Axes, values: Sequence[float], x_label: str, y_label: str, empty: str
) -> None:
    """Labels, scale, and a legend under the axes, where it cannot cover data."""
    from matplotlib.ticker import MaxNLocator

    fig.dress(axis)
    axis.set_xlabel(x_label, fontsize=9)
    axis.set_ylabel(figure_text(y_label, 40), fontsize=9, parse_math=False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    fig.set_y_scale(axis, values, decades=3)
    if empty:
        fig.note(axis, empty)
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
