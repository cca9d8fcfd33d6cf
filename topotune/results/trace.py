"""The step-resolution trace of one trial: read the archive, thin it, draw it."""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from topotune.errors import RunError
from topotune.results import figure as fig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array: TypeAlias = NDArray[np.float64]

LIMIT = 2000
"""Points of a series in a figure: more than its pixels."""

MEDIANS = 200
"""Bins of the median line over a long series; its envelope then becomes the pale background."""

_ENERGY = "field energy"
_PANELS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    ("training loss", (("loss", "training loss", fig.BLUE),)),
    (
        "magnitude",
        (
            ("grad_norm", "gradient norm", fig.GREEN),
            ("coupling_current", "coupling current", fig.PURPLE),
        ),
    ),
    (_ENERGY, (("energy", "raw", fig.ORANGE), ("energy_controlled", "controlled", fig.BLUE))),
    (
        "relaxed energy",
        (("energy_free", "free", fig.BLUE), ("energy_nudged", "nudged", fig.ORANGE)),
    ),
    (
        "residual",
        (("residual_free", "free", fig.BLUE), ("residual_nudged", "nudged", fig.ORANGE)),
    ),
    (
        "flow evaluations",
        (("nfe_free", "free", fig.BLUE), ("nfe_nudged", "nudged", fig.ORANGE)),
    ),
)
_DASHED = frozenset({"energy_nudged"})
"""Series that lie so close over another that both can only be seen through gaps."""

_KNOWN = tuple(key for _, series in _PANELS for key, _, _ in series)


@dataclass(frozen=True)
class Trace:
    """A trial's values at step resolution.

    Attributes:
        step: (n,) optimizer steps, finite.
        series: name to (n,) values, non-finite ones included.
    """

    step: Array
    series: Mapping[str, Array]

    @property
    def first_nonfinite(self) -> int | None:
        """The first step whose loss or gradient norm is NaN or infinite."""
        bad = np.zeros(len(self.step), dtype=bool)
        for key in ("loss", "grad_norm"):
            if key in self.series:
                bad |= ~np.isfinite(self.series[key])
        return int(self.step[bad].min()) if bad.any() else None


def read_archive(path: Path, names: Collection[str], what: str) -> dict[str, Any]:
    """Those of the named arrays that an ``.npz`` archive has.

    Args:
        path: the archive.
        names: of arrays; others are left.
        what: the archive in a word, for the message.

    Raises:
        RunError: the file is missing or no archive.
    """
    try:
        # opened here: numpy leaves a file of its own open when the archive is damaged
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise RunError(f"{path}: a single array, expected an .npz archive of several")
            return {name: archive[name] for name in names if name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(f"{path}: not a readable .npz {what}: {error}") from error


def read_trace(path: Path) -> Trace:
    """Read an ``.npz`` archive with ``step`` and any of the known series; other arrays are left.

    Raises:
        RunError: the file is missing or no archive, ``step`` is missing, or an array is not a
            row of real numbers as long as ``step``.
    """
    raw = read_archive(path, ("step", *_KNOWN), "trace")
    if "step" not in raw:
        raise RunError(f"{path}: no array 'step'; a trace needs one step number a value")
    arrays: dict[str, Array] = {}
    for name, array in raw.items():
        if array.dtype.kind not in "biuf" or array.ndim != 1 or len(array) != len(raw["step"]):
            raise RunError(
                f"{path}: array {name!r} is {array.dtype} of shape {array.shape}, expected "
                f"{len(raw['step']) if raw['step'].ndim else 'some'} real numbers, one a step"
            )
        with np.errstate(over="ignore"):
            arrays[name] = array.astype(np.float64)
    step = arrays.pop("step")
    placed = np.abs(step) < 2.0**53  # NaN and infinities fail it too
    return Trace(step[placed], {name: values[placed] for name, values in arrays.items()})


def envelope(x: Array, y: Array, limit: int = LIMIT) -> tuple[Array, Array]:
    """Thin a series to at most ``limit`` points: the minimum and maximum of each of equal bins.

    A spike of a single step therefore survives. Within a bin non-finite values give way to finite
    ones; a bin without any gives one of them, a gap in the line.

    Args:
        x: (n,) positions.
        y: (n,) values.
        limit: at least 2.
    """
    if len(y) <= limit:
        return x, y
    edges = np.linspace(0, len(y), limit // 2 + 1).astype(int)
    picks: list[int] = []
    for start, stop in itertools.pairwise(edges):
        part = y[start:stop]
        finite = np.isfinite(part)
        if not finite.any():
            picks.append(int(start))
            continue
        low = int(start) + int(np.where(finite, part, np.inf).argmin())
        high = int(start) + int(np.where(finite, part, -np.inf).argmax())
        picks += sorted({low, high})
    return x[picks], y[picks]


def medians(x: Array, y: Array, bins: int = MEDIANS) -> tuple[Array, Array]:
    """The median of the finite values of each of ``bins`` equal bins; NaN where there are none.

    Args:
        x: (n,) positions, n at least ``bins``.
        y: (n,) values.
        bins: length of the result.
    """
    edges = np.linspace(0, len(y), bins + 1).astype(int)
    middle = np.full(bins, np.nan)
    for index, (start, stop) in enumerate(itertools.pairwise(edges)):
        part = y[start:stop]
        finite = part[np.isfinite(part)]
        if finite.size:
            middle[index] = np.median(finite)
    return x[(edges[:-1] + edges[1:]) // 2], middle


def plot_trace(npz_path: Path, png_path: Path, title: str = "") -> None:
    """Draw loss, gradient norm with coupling current, and energies over shared steps.

    Of networks that relax also the residuals and the evaluations of the flow. A panel whose
    series are absent is left out; scales are logarithmic where values are positive and span half
    a decade. A long series is a pale envelope, minimum to maximum, under a line of medians. The
    first non-finite loss or gradient is marked by a dotted line.

    Args:
        npz_path: arrays ``step`` and any of ``loss``, ``grad_norm``, ``energy``,
            ``energy_controlled``, ``coupling_current``, and ``energy``, ``residual`` and ``nfe``
            with ``_free`` or ``_nudged`` behind, each of one value a step.
        png_path: where to write; replaced only by a finished picture.
        title: shown above; any text.

    Raises:
        RunError: the file is no such archive, or its arrays do not match.
        ResourceError: the picture cannot be written.
    """
    trace = read_trace(npz_path)
    panels = [
        (label, [s for s in series if s[0] in trace.series])
        for label, series in _PANELS
        if any(s[0] in trace.series for s in series)
    ]
    figure, axes = fig.new_stack(max(len(panels), 1), title)
    broken = trace.first_nonfinite
    for axis, (label, series) in zip(axes, panels, strict=False):
        single = len(series) == 1 and label != _ENERGY
        axis.set_ylabel(series[0][1] if single else label, fontsize=9)
        _draw(axis, trace, series)
        if broken is not None:
            axis.axvline(broken, color=fig.RED, linewidth=1.2, linestyle=":")
        if len(series) > 1:
            axis.legend(
                loc="lower right",
                bbox_to_anchor=(1.0, 0.98),
                ncols=3,
                frameon=False,
                fontsize=8,
                borderaxespad=0.0,
            )
    if not panels or not len(trace.step):
        fig.note(axes[0], "no steps recorded")
    elif broken is not None:
        axes[0].set_title(
            f"not finite from step {broken} (dotted)", loc="left", fontsize=8, color=fig.RED
        )
    axes[-1].set_xlabel("optimizer step", fontsize=9)
    fig.save(figure, png_path)


def _draw(axis: Axes, trace: Trace, series: Sequence[tuple[str, str, str]]) -> None:
    """The lines of one panel and its scale."""
    seen: list[float] = []
    for key, label, colour in series:
        with np.errstate(invalid="ignore"):
            kept = np.where(np.abs(trace.series[key]) <= fig.HUGE, trace.series[key], np.nan)
        x, y = envelope(trace.step, kept)
        alone = np.isfinite(y).sum() <= 40  # single points between gaps draw no line
        dense = len(kept) > 4 * MEDIANS
        style = (0, (4, 3)) if key in _DASHED else "-"
        axis.plot(
            x,
            y,
            color=colour,
            alpha=0.5 if dense else 1.0,
            linewidth=0.6 if dense else 0.9,
            linestyle="-" if dense else style,
            marker="." if alone else "",
            label=None if dense else label,
        )
        if dense:
            line = medians(trace.step, kept)
            axis.plot(*line, color=colour, linewidth=1.3, linestyle=style, label=label)
        seen += y[np.isfinite(y)].tolist()
    fig.set_y_scale(axis, seen, decades=0.5)
