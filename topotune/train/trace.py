"""The record of every step: collected in blocks, kept as one file an epoch, joined at the end."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from topotune.errors import CheckpointError
from topotune.files import write_atomically

_log = logging.getLogger(__name__)

TRACE_FILE = "trace.npz"
"""Name of the joined file: arrays ``step`` (from 1), ``loss``, ``grad_norm`` and whatever the
optimizer traces, such as ``energy``, ``energy_controlled``, ``coupling_current``; float64, NaN
where a step has no value."""

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
        raise CheckpointError(f"step trace {path}: cannot be read: {error}") from error


class TraceFolder:
    """One file an epoch under a trial's folder.

    An epoch's file is written before its checkpoint, so every checkpointed epoch has one; an
    epoch that is trained again after a crash overwrites its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, epoch: int, trace: StepTrace) -> None:
        """Keep one epoch's steps."""
        self._folder.mkdir(exist_ok=True)
        write_columns(self._path(epoch), trace.columns())

    def join(self, epochs: int, target: Path) -> bool:
        """Write the steps of epochs 1 to ``epochs`` as one file; False where there are none.

        An epoch whose file is missing or damaged is left out and named in the log: the trial's
        result is worth more than its trace.
        """
        parts: list[Columns] = []
        for epoch in range(1, epochs + 1):
            try:
                parts.append(read_columns(self._path(epoch)))
            except CheckpointError as error:
                _log.warning("%s; the trace goes without epoch %d", error, epoch)
        if parts:
            write_columns(target, join(parts))
        return bool(parts)

    def _path(self, epoch: int) -> Path:
        return self._folder / f"epoch-{epoch:05d}.npz"
