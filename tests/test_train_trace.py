"""The record of every step."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from topotune.errors import CheckpointError
from topotune.train.trace import StepTrace, TraceFolder, read_columns


def _trace(first: int, count: int, **columns: float) -> StepTrace:
    trace = StepTrace()
    steps = np.arange(first, first + count)
    trace.append({"step": steps} | {name: steps * factor for name, factor in columns.items()})
    return trace


def test_blocks_are_appended_in_order() -> None:
    trace = StepTrace()
    trace.append({"step": np.array([1, 2]), "loss": np.array([0.5, 0.25])})
    trace.append({"step": np.array([3]), "loss": np.array([0.125])})
    assert len(trace) == 3
    columns = trace.columns()
    assert columns["step"].tolist() == [1, 2, 3]
    assert columns["loss"].tolist() == [0.5, 0.25, 0.125]


def test_epochs_are_joined_and_gaps_are_nan(tmp_path: Path) -> None:
    folder = TraceFolder(tmp_path / "trace")
    folder.write(1, _trace(1, 2, loss=1.0))
    folder.write(2, _trace(3, 1, loss=1.0, energy=2.0))
    folder.write(3, _trace(4, 9, loss=1.0))
    assert folder.join(2, tmp_path / "trace.npz")
    columns = read_columns(tmp_path / "trace.npz")
    assert columns["step"].tolist() == [1, 2, 3]
    assert columns["loss"].tolist() == [1.0, 2.0, 3.0]
    np.testing.assert_array_equal(columns["energy"], [np.nan, np.nan, 6.0])


def test_equal_steps_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = TraceFolder(tmp_path / name)
        folder.write(1, _trace(1, 2, loss=1.0))
        folder.write(1, _trace(1, 3, loss=1.0))  # an epoch trained again replaces its own
        folder.join(1, tmp_path / f"{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert read_columns(tmp_path / "a.npz")["step"].tolist() == [1, 2, 3]


def test_a_damaged_epoch_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = TraceFolder(tmp_path / "trace")
    for epoch in (1, 2, 3):
        folder.write(epoch, _trace(epoch, 1, loss=1.0))
    (tmp_path / "trace" / "epoch-00002.npz").write_bytes(b"PK nonsense")
    with caplog.at_level(logging.WARNING, logger="topotune"):
        assert folder.join(3, tmp_path / "trace.npz")
    assert read_columns(tmp_path / "trace.npz")["step"].tolist() == [1, 3]
    assert "without epoch 2" in caplog.text


def test_no_epoch_gives_no_file(tmp_path: Path) -> None:
    assert not TraceFolder(tmp_path / "trace").join(0, tmp_path / "trace.npz")
    assert not (tmp_path / "trace.npz").exists()
    with pytest.raises(CheckpointError, match=r"trace\.npz"):
        read_columns(tmp_path / "trace.npz")
