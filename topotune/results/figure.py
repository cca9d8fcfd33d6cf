"""What every figure shares: the canvas, the choice of an axis scale, and an atomic save.

Only matplotlib's object interface is used: no global state, no window, safe in any thread.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from topotune.errors import ResourceError
from topotune.files import write_atomically
from topotune.results.text import figure_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
WIDTH = 7.0  # inches: a page's text width
INK, BLUE, ORANGE, GREEN = "#222222", "#0072B2", "#D55E00", "#009E73"
RED, GREY, PURPLE = "#B2182B", "#9A9A9A", "#8B5A9B"

HUGE = 1e100
"""Values beyond this, or positive ones below its inverse, are not drawn: they would flatten the
rest, and matplotlib's tick arithmetic overflows near the largest floats."""


def drawable(value: float | None) -> TypeGuard[float]:
    """Whether a value can stand in a figure: known, finite, and not absurdly large."""
    return value is not None and abs(value) <= HUGE  # NaN compares as False


def new_figure(height: float, title: str) -> Figure:
    """An empty figure of text width and ``height`` inches, titled with any text.

    matplotlib's constrained layout finds the margins: a second or so of work for many axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(figure_text(title), fontsize=10, parse_math=False)
    return figure


def new_stack(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure of equal axes under each other that share x, in fixed margins: fast to draw."""
    from matplotlib.figure import Figure

    top, bottom, each, gap = 0.5, 0.5, 1.45, 0.3  # inches
    height = top + bottom + panels * each + (panels - 1) * gap
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    figure.subplots_adjust(
        left=0.8 / WIDTH,
        right=1 - 0.15 / WIDTH,
        bottom=bottom / height,
        top=1 - top / height,
        hspace=gap / each,
    )
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    for axis in axes:
        dress(axis)
        axis.yaxis.set_label_coords(-0.55 / (WIDTH - 0.95), 0.5)
    if title:
        figure.suptitle(figure_text(title), fontsize=10, parse_math=False, y=1 - 0.1 / height)
    return figure, axes


def dress(axis: Axes) -> None:
    """The common look: light grid, open frame."""
    axis.grid(True, color="#E6E6E6", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def set_y_scale(axis: Axes, values: Iterable[float], decades: float) -> None:
    """Choose the scale and limits that show all values, with a margin.

    Args:
        axis: of the figure.
        values: drawable ones; none leaves the axis as it is.
        decades: a log scale if the values span at least this many powers of ten, at least nine
            in ten are positive and none is negative; zeros then lie outside.
    """
    known = list(values)
    if not known:
        return
    low, high = min(known), max(known)
    positive = [v for v in known if v >= 1 / HUGE]
    if low >= 0 and positive and len(positive) >= 0.9 * len(known):
        least = min(positive)
        span = math.log10(high / least)
        if span >= max(decades, 0.5):
            _log_axis(axis, least, high, span)
            return
    # the second term keeps the limits apart where values differ by rounding only
    margin = max(0.06 * (high - low), 1e-6 * max(abs(low), abs(high))) or 1.0
    axis.set_ylim(low - margin, high + margin)


def _log_axis(axis: Axes, low: float, high: float, span: float) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    margin = 10 ** (0.06 * span)
    axis.set_ylim(low / margin, high * margin)
    if span < 2:  # decades alone would label too few ticks
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_locator(NullLocator())  # small ticks cost a third of the drawing time


def note(axis: Axes, text: str) -> None:
    """A line of text in the middle of an axis that has nothing else to show."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=GREY)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; an old one is replaced only when the new one is complete.

    Raises:
        ResourceError: the folder or the file cannot be written.
    """
    picture = io.BytesIO()
    # without the library's version in the metadata, equal input gives equal bytes
    figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, picture.getvalue())
    except OSError as error:
        raise ResourceError(
            f"{path}: the figure cannot be written: {error.strerror or error}. "
            "Free space or choose a folder that can be written"
        ) from error
