"""How one batch relaxed after each epoch: read the archive and draw it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from topotune.errors import RunError
from topotune.results import figure as fig
from topotune.results.trace import Array, read_archive

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = 12
"""Epochs that a figure shows at most: more lines cover each other."""

_ENERGY, _RESIDUAL = "energy", "residual"
_LABELS = {_ENERGY: "energy above its end", _RESIDUAL: "residual"}


@dataclass(frozen=True)
class Relaxations:
    """The course of one relaxation after each epoch.

    Attributes:
        epoch: (epochs,).
        time: (epochs, steps); NaN after a curve's end.
        series: ``energy`` and ``residual``, as far as they are known, (epochs, steps).
    """

    epoch: Array
    time: Array
    series: Mapping[str, Array]


def read_relaxations(path: Path) -> Relaxations:
    """Read an ``.npz`` archive with ``epoch``, ``time`` and the known series.

    Raises:
        RunError: the file is missing or no archive, ``epoch`` or ``time`` is missing, or an array
            is not a row of real numbers an epoch.
    """
    raw = read_archive(path, ("epoch", "time", *_LABELS), "of relaxations")
    for name in ("epoch", "time"):
        if name not in raw:
            raise RunError(f"{path}: no array {name!r}; a relaxation needs one")
    wanted = dict.fromkeys(raw, raw["time"].shape) | {"epoch": raw["time"].shape[:1]}
    for name, array in raw.items():
        if array.dtype.kind not in "biuf" or raw["time"].ndim != 2 or array.shape != wanted[name]:
            raise RunError(
                f"{path}: array {name!r} is {array.dtype} of shape {array.shape}, expected real "
                f"numbers of shape {'(epochs,)' if name == 'epoch' else '(epochs, steps)'}"
            )
    arrays = {name: array.astype(np.float64) for name, array in raw.items()}
    return Relaxations(arrays.pop("epoch"), arrays.pop("time"), arrays)


def spread_out(epochs: int, limit: int = LINES) -> list[int]:
    """Indices of at most ``limit`` of so many epochs: the first, the last, even steps between."""
    if epochs <= limit:
        return list(range(epochs))
    return sorted({round(i * (epochs - 1) / (limit - 1)) for i in range(limit)})


def plot_relaxation(npz_path: Path, png_path: Path, title: str = "") -> None:
    """Draw how energy and residual fell along one relaxation of the same batch, epoch by epoch.

    Above the energy less its final value, below the residual, both on log scales over the time of
    the dynamics; one line an epoch, dark to bright. A panel whose series is absent is left out,
    and so is what a log scale cannot show: an energy from where it first reached its end.

    Args:
        npz_path: what :func:`read_relaxations` reads.
        png_path: where to write; replaced only by a finished picture.
        title: shown above; any text.

    Raises:
        RunError: the file is no such archive, or its arrays do not match.
        ResourceError: the picture cannot be written.
    """
    found = read_relaxations(npz_path)
    rows = spread_out(len(found.epoch))
    panels = [name for name in _LABELS if np.isfinite(found.series.get(name, np.nan)).any()]
    figure = fig.new_figure(1.0 + 2.0 * max(len(panels), 1), title)
    axes = list(figure.subplots(max(len(panels), 1), 1, sharex=True, squeeze=False)[:, 0])
    colours = _colours(len(rows))
    for axis, name in zip(axes, panels, strict=False):
        fig.dress(axis)
        axis.set_ylabel(_LABELS[name], fontsize=9)
        seen: list[float] = []
        for row, colour in zip(rows, colours, strict=True):
            y = _falling(found.series[name][row], relative=name == _ENERGY)
            alone = np.isfinite(y).sum() < 2  # a single point draws no line
            marker = "." if alone else ""
            axis.plot(found.time[row], y, color=colour, linewidth=1.1, marker=marker)
            seen += y[np.isfinite(y)].tolist()
        fig.set_y_scale(axis, seen, decades=0.5)
    if panels:
        _key(figure, axes, colours, found.epoch[rows])
    else:
        fig.dress(axes[0])
        fig.note(axes[0], "no relaxation recorded")
    axes[-1].set_xlabel("time of the dynamics", fontsize=9)
    fig.save(figure, png_path)


def _falling(values: Array, *, relative: bool) -> Array:
    """A curve as a log scale takes it: NaN for what is not positive or absurdly large.

    Args:
        values: (steps,), NaN after the end.
        relative: subtract the last finite value, and leave out all from where the curve first
            came down to it: what follows is rounding.
    """
    finite = values[np.isfinite(values)]
    with np.errstate(invalid="ignore", over="ignore"):
        height = values
        if relative and finite.size:
            height = values - finite[-1]
            height = np.where(np.logical_or.accumulate(height <= 0), np.nan, height)
        return np.where((height > 1 / fig.HUGE) & (height <= fig.HUGE), height, np.nan)


def _colours(count: int) -> list[tuple[float, ...]]:
    """Dark to bright; the map's brightest end would vanish on white."""
    import matplotlib

    return [tuple(c) for c in matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, count))]


def _key(figure: Figure, axes: list[Axes], colours: list[tuple[float, ...]], epochs: Array) -> None:
    """A bar of the lines' colours, each with its epoch."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(colours)
    norm = BoundaryNorm(np.arange(count + 1) - 0.5, count)
    bar = figure.colorbar(
        ScalarMappable(norm, ListedColormap(colours)),
        ax=axes,
        ticks=np.arange(count),
        pad=0.02,
        aspect=35,
    )
    bar.ax.set_yticklabels([f"{epoch:.0f}" for epoch in epochs])
    bar.ax.tick_params(labelsize=8, length=0)
    bar.set_label("epoch", fontsize=9)
