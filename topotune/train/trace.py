"""What a trial records besides its metrics: kept as one file an epoch, joined at the end.

Of every optimizer step its numbers, and of every epoch, where the learner has them, the curves of
one relaxation.
"""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from topotune.errors import CheckpointError
from topotune.files import write_atomically

_log = logging.getLogger(__name__)

TRACE_FILE = "trace.npz"
"""Name of the joined file: arrays ``step`` (from 1), ``loss``, ``grad_norm`` and whatever the
optimizer and the learner trace, such as ``energy``, ``energy_controlled``, ``coupling_current``;
float64, NaN where a step has no value."""

RELAXATION_FILE = "relaxation.npz"
"""Name of the joined file: ``epoch`` (epochs,), and (epochs, steps) of ``time`` and whatever the
learner gives along it, such as ``energy`` and ``residual``; float64, NaN after a curve's end."""

SERIES_POINTS = 32
"""Points of a series and an epoch that :func:`thinned` leaves at most."""

TRACE_FOLDER = "trace"
RELAXATION_FOLDER = "relaxation"

Columns = dict[str, np.ndarray]


class StepTrace:
    """The per-step columns of one epoch, appended block by block."""

    def __init__(self) -> None:
        self._blocks: list[Columns] = []

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Add the next steps; all columns have one length."""
        self._blocks.append(dict(columns))

    def __len__(self) -> int:
        return sum(len(block["step"]) for block in self._blocks)

    def columns(self) -> Columns:
        """All steps so far; a column that a block lacks is NaN there."""
        return join(self._blocks)


def join(parts: list[Columns]) -> Columns:
    """Concatenate parts that each have a ``step`` column."""
    names = sorted({name for part in parts for name in part})
    joined: Columns = {}
    for name in names:
        pieces = [
            part[name] if name in part else np.full(len(part["step"]), np.nan) for part in parts
        ]
        joined[name] = np.concatenate(pieces)
    return joined


def thinned(columns: Columns) -> dict[str, list[tuple[int, float]]]:
    """Some steps of an epoch for a chart: evenly spaced, the last one among them.

    Args:
        columns: an epoch's, ``step`` among them.

    Returns:
        Of each other column (step, value) points, to the 6 digits that a chart can show; steps
        without a value are left out, and so are columns without any.
    """
    steps = columns["step"]
    count = min(SERIES_POINTS, len(steps))
    chosen = np.ceil(np.arange(1, count + 1) * len(steps) / max(count, 1)).astype(int) - 1
    found: dict[str, list[tuple[int, float]]] = {}
    for name in sorted(columns.keys() - {"step"}):
        curve = [(int(steps[i]), float(f"{columns[name][i]:.6g}")) for i in chosen]
        if curve := [(step, value) for step, value in curve if not np.isnan(value)]:
            found[name] = curve
    return found


def stack(parts: Mapping[int, Columns]) -> Columns:
    """Curves of several epochs as rows of one array each, NaN where one is shorter or missing.

    Args:
        parts: epoch to its curves, 1-d.
    """
    names = sorted({name for part in parts.values() for name in part})
    width = max((curve.size for part in parts.values() for curve in part.values()), default=0)
    stacked: Columns = {"epoch": np.array(list(parts), dtype=np.float64)}
    for name in names:
        rows = np.full((len(parts), width), np.nan)
        for row, part in zip(rows, parts.values(), strict=True):
            curve = part.get(name, np.empty(0))
            row[: curve.size] = curve
        stacked[name] = rows
    return stacked


def write_columns(path: Path, columns: Columns) -> None:
    """Write columns as one compressed npz, atomically; equal columns give equal bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **columns)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def read_columns(path: Path) -> Columns:
    """Read what :func:`write_columns` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"record {path}: cannot be read: {error}") from error


class EpochFolder:
    """One file an epoch under a trial's folder, joined when the trial has ended.

    An epoch's file is written before its checkpoint, so every checkpointed epoch has one; an
    epoch that is trained again after a crash overwrites its own.

    Args:
        folder: made at the first write.
        join: epoch to its columns, in order, to the columns of the joined file.
    """

    def __init__(self, folder: Path, join: Callable[[Mapping[int, Columns]], Columns]) -> None:
        self._folder, self._join = folder, join

    def write(self, epoch: int, columns: Columns) -> None:
        """Keep one epoch's columns."""
        self._folder.mkdir(exist_ok=True)
        write_columns(self._path(epoch), columns)

    @property
    def last(self) -> int:
        """The last epoch that has a file; 0 where none has."""
        return max((int(path.stem[6:]) for path in self._folder.glob("epoch-*.npz")), default=0)

    def read(self, epoch: int) -> Columns:
        """One epoch's columns.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        return read_columns(self._path(epoch))

    def join(self, epochs: int, target: Path) -> bool:
        """Write epochs 1 to ``epochs`` as one file; False where there are none.

        An epoch whose file is missing or damaged is left out and named in the log: the trial's
        result is worth more than its record.
        """
        parts: dict[int, Columns] = {}
        for epoch in range(1, epochs + 1):
            try:
                parts[epoch] = self.read(epoch)
            except CheckpointError as error:
                _log.warning("%s; %s goes without epoch %d", error, target.name, epoch)
        if parts:
            write_columns(target, self._join(parts))
        return bool(parts)

    def _path(self, epoch: int) -> Path:
        return self._folder / f"epoch-{epoch:05d}.npz"


def step_traces(trial: Path) -> EpochFolder:
    """The step traces of a trial's epochs, to be joined as :data:`TRACE_FILE`."""
    return EpochFolder(trial / TRACE_FOLDER, lambda parts: join(list(parts.values())))


def relaxations(trial: Path) -> EpochFolder:
    """The relaxation curves of a trial's epochs, to be joined as :data:`RELAXATION_FILE`."""
    return EpochFolder(trial / RELAXATION_FOLDER, stack)


class EpochRecord:
    """What a trial in training keeps of each epoch; joined into the files that it hands over.

    Args:
        trial: the trial's folder.
    """

    def __init__(self, trial: Path) -> None:
        self._trial = trial
        self._steps, self._curves = step_traces(trial), relaxations(trial)
        self._last = 0

    def write_steps(self, epoch: int, trace: StepTrace) -> None:
        """Keep the steps of an epoch, whole or broken off."""
        if len(trace):
            self._steps.write(epoch, trace.columns())
            self._last = epoch

    def write_curves(self, epoch: int, curves: Columns) -> None:
        """Keep the curves of an epoch; none write nothing."""
        if curves:
            self._curves.write(epoch, curves)

    def join(self, epochs: int) -> list[Path]:
        """Join the epochs up to ``epochs`` and those written since, and return the files."""
        last = max(epochs, self._last)  # a diverged epoch has steps to show and no report
        done = []
        if self._steps.join(last, self._trial / TRACE_FILE):
            done.append(self._trial / TRACE_FILE)
        if self._curves.last and self._curves.join(epochs, self._trial / RELAXATION_FILE):
            done.append(self._trial / RELAXATION_FILE)
        return done
