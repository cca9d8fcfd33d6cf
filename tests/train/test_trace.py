"""The record of every step."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from topotune.errors import CheckpointError
from topotune.train.trace import (
    RELAXATION_FILE,
    SERIES_POINTS,
    TRACE_FILE,
    Columns,
    EpochRecord,
    StepTrace,
    read_columns,
    relaxations,
    stack,
    step_traces,
    thinned,
)


def _trace(first: int, count: int, **columns: float) -> StepTrace:
    trace = StepTrace()
    steps = np.arange(first, first + count)
    trace.append({"step": steps} | {name: steps * factor for name, factor in columns.items()})
    return trace


def _columns(first: int, count: int, **columns: float) -> Columns:
    return _trace(first, count, **columns).columns()


def test_blocks_are_appended_in_order() -> None:
    trace = StepTrace()
    trace.append({"step": np.array([1, 2]), "loss": np.array([0.5, 0.25])})
    trace.append({"step": np.array([3]), "loss": np.array([0.125])})
    assert len(trace) == 3
    columns = trace.columns()
    assert columns["step"].tolist() == [1, 2, 3]
    assert columns["loss"].tolist() == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100, 4000])
def test_a_chart_gets_some_steps_of_an_epoch_and_its_last(count: int) -> None:
    columns = _columns(11, count, loss=1 / 3)
    columns["rare"] = np.where(columns["step"] == 10 + count, np.inf, np.nan)
    columns["none"] = np.full(count, np.nan)
    found = thinned(columns)
    assert found.keys() == {"loss", "rare"}
    steps = [step for step, _ in found["loss"]]
    assert len(steps) == min(count, SERIES_POINTS)
    assert steps == sorted(set(steps))
    assert steps[-1] == 10 + count
    gaps = np.diff([10, *steps])
    assert gaps.max() - gaps.min() <= 1
    assert all(value == float(f"{step / 3:.6g}") for step, value in found["loss"])
    assert found["rare"] == [(10 + count, np.inf)]


def test_epochs_are_joined_and_gaps_are_nan(tmp_path: Path) -> None:
    folder = step_traces(tmp_path)
    folder.write(1, _columns(1, 2, loss=1.0))
    folder.write(2, _columns(3, 1, loss=1.0, energy=2.0))
    folder.write(3, _columns(4, 9, loss=1.0))
    assert folder.join(2, tmp_path / "trace.npz")
    columns = read_columns(tmp_path / "trace.npz")
    assert columns["step"].tolist() == [1, 2, 3]
    assert columns["loss"].tolist() == [1.0, 2.0, 3.0]
    np.testing.assert_array_equal(columns["energy"], [np.nan, np.nan, 6.0])


def test_equal_steps_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        folder = step_traces(tmp_path / name)
        folder.write(1, _columns(1, 2, loss=1.0))
        folder.write(1, _columns(1, 3, loss=1.0))  # an epoch trained again replaces its own
        folder.join(1, tmp_path / f"{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert read_columns(tmp_path / "a.npz")["step"].tolist() == [1, 2, 3]


def test_a_damaged_epoch_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = step_traces(tmp_path)
    for epoch in (1, 2, 3):
        folder.write(epoch, _columns(epoch, 1, loss=1.0))
    (tmp_path / "trace" / "epoch-00002.npz").write_bytes(b"PK nonsense")
    with caplog.at_level(logging.WARNING, logger="topotune"):
        assert folder.join(3, tmp_path / "trace.npz")
    assert read_columns(tmp_path / "trace.npz")["step"].tolist() == [1, 3]
    assert "without epoch 2" in caplog.text


def test_no_epoch_gives_no_file(tmp_path: Path) -> None:
    assert not step_traces(tmp_path).join(0, tmp_path / "trace.npz")
    assert not (tmp_path / "trace.npz").exists()
    with pytest.raises(CheckpointError, match=r"trace\.npz"):
        read_columns(tmp_path / "trace.npz")


def test_curves_of_several_epochs_are_rows_of_one_width() -> None:
    joined = stack(
        {
            2: {"time": np.array([0.0, 0.5]), "energy": np.array([3.0, 1.0])},
            5: {"time": np.array([0.0, 0.5, 1.0]), "residual": np.array([9.0, 3.0, 1.0])},
        }
    )
    assert joined["epoch"].tolist() == [2.0, 5.0]
    nan = np.nan
    np.testing.assert_array_equal(joined["time"], [[0.0, 0.5, nan], [0.0, 0.5, 1.0]])
    np.testing.assert_array_equal(joined["energy"], [[3.0, 1.0, nan], [nan, nan, nan]])
    np.testing.assert_array_equal(joined["residual"], [[nan, nan, nan], [9.0, 3.0, 1.0]])


def test_a_record_hands_over_what_there_is(tmp_path: Path) -> None:
    record = EpochRecord(tmp_path)
    record.write_steps(1, _trace(1, 3, loss=1.0))
    record.write_curves(1, {})
    assert record.join(1) == [tmp_path / TRACE_FILE]
    assert relaxations(tmp_path).last == 0
    record.write_curves(1, {"time": np.arange(2.0)})
    record.write_curves(2, {"time": np.arange(4.0)})  # its checkpoint was never written
    record.write_steps(2, _trace(4, 2, loss=1.0))  # the epoch diverged
    assert record.join(1) == [tmp_path / TRACE_FILE, tmp_path / RELAXATION_FILE]
    assert read_columns(tmp_path / TRACE_FILE)["step"].tolist() == [1, 2, 3, 4, 5]
    assert read_columns(tmp_path / RELAXATION_FILE)["time"].tolist() == [[0.0, 1.0]]
    assert step_traces(tmp_path).last == 2
