"""Checkpoints: whole, checked, of the right trial, or refused."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train_cases import assert_same, blobs_spec
from topotune.errors import CheckpointError, ResourceError
from topotune.files import make_folder, write_atomically
from topotune.records import OverheadOptions, TrainOptions
from topotune.train.checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE, CheckpointStore
from topotune.train.process import capture_generators, restore_generators

CPU = torch.device("cpu")


def _state(number: int) -> dict[str, object]:
    return {
        "epoch": number,
        "weights": {"w": torch.arange(5.0) * number, "steps": torch.tensor(number)},
        "generators": capture_generators(CPU),
        "window": [0.1, float("inf")],
    }


def _saved_twice(folder: Path) -> CheckpointStore:
    store = CheckpointStore(folder, blobs_spec())
    store.save(_state(1))
    store.save(_state(2))
    return store


def test_nothing_saved_is_nothing_loaded(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path, blobs_spec()).load() is None


def test_the_newest_state_comes_back_exactly(tmp_path: Path) -> None:
    saved = _state(3)
    store = CheckpointStore(tmp_path, blobs_spec())
    store.save(_state(1))
    store.save(saved)
    assert_same(store.load(), saved)


@pytest.mark.parametrize("keep", [0, 10, 100, 0.5, -1], ids=str)
def test_a_truncated_newest_falls_back_to_the_previous_and_says_so(
    tmp_path: Path, keep: float, caplog: pytest.LogCaptureFixture
) -> None:
    store = _saved_twice(tmp_path)
    content = (tmp_path / CHECKPOINT_FILE).read_bytes()
    length = int(keep * len(content)) if isinstance(keep, float) else keep % len(content)
    (tmp_path / CHECKPOINT_FILE).write_bytes(content[:length])
    with caplog.at_level(logging.WARNING, logger="topotune"):
        state = store.load()
    assert state is not None
    assert state["epoch"] == 1
    assert CHECKPOINT_FILE in caplog.text
    assert PREVIOUS_FILE in caplog.text


@pytest.mark.parametrize("place", [5, 40, 300, -40])
def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path, place: int) -> None:
    store = _saved_twice(tmp_path)
    content = bytearray((tmp_path / CHECKPOINT_FILE).read_bytes())
    content[place] ^= 4
    (tmp_path / CHECKPOINT_FILE).write_bytes(bytes(content))
    state = store.load()
    assert state is not None
    assert state["epoch"] == 1


def test_a_crash_between_the_two_renames_leaves_the_previous(tmp_path: Path) -> None:
    store = _saved_twice(tmp_path)
    (tmp_path / CHECKPOINT_FILE).replace(tmp_path / PREVIOUS_FILE)
    state = store.load()
    assert state is not None
    assert state["epoch"] == 2


def test_two_damaged_files_are_an_error_that_names_them_and_the_fix(tmp_path: Path) -> None:
    store = _saved_twice(tmp_path)
    for name in (CHECKPOINT_FILE, PREVIOUS_FILE):
        (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="delete the folder") as caught:
        store.load()
    assert CHECKPOINT_FILE in str(caught.value)
    assert PREVIOUS_FILE in str(caught.value)


def test_a_damaged_only_checkpoint_is_not_taken_for_a_fresh_start(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, blobs_spec())
    store.save(_state(1))
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"")
    with pytest.raises(CheckpointError, match=CHECKPOINT_FILE):
        store.load()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 8},
        {"params": {"lr": 0.02}},
        {"method": "sgd"},
        {"epochs": 4},
        {"split_seed": 1},
        {"task_options": {"scale": 2.0}},
        {"train": TrainOptions(batch_size=17, schedule="cosine", grad_clip=1.0)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_trials_checkpoint_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    _saved_twice(tmp_path)
    with pytest.raises(CheckpointError, match="belongs to another trial") as caught:
        CheckpointStore(tmp_path, blobs_spec(**changes)).load()
    assert next(iter(changes)) in str(caught.value)


def test_where_a_trial_runs_is_no_part_of_its_identity(tmp_path: Path) -> None:
    _saved_twice(tmp_path)
    moved = dataclasses.replace(
        blobs_spec(), device="auto", threads=4, data_dir="x", overhead=OverheadOptions(blocks=3)
    )
    state = CheckpointStore(tmp_path, moved).load()
    assert state is not None
    assert state["epoch"] == 2


def test_a_failed_save_leaves_the_last_one(tmp_path: Path) -> None:
    store = _saved_twice(tmp_path)
    (tmp_path / (CHECKPOINT_FILE + ".partial")).mkdir()  # the write must fail, for root too
    with pytest.raises(CheckpointError, match="cannot be written"):
        store.save(_state(3))
    state = store.load()
    assert state is not None
    assert state["epoch"] == 2


def test_an_atomic_write_leaves_no_other_file(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_atomically(tmp_path / "file", content)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"two"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="file/inner"):
        make_folder(tmp_path / "file" / "inner")


def _draws() -> tuple[object, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.normal()),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
    )


def test_generators_continue_where_they_were() -> None:
    _draws()  # leaves Python's and NumPy's second Gaussian pending, which is state too
    states = capture_generators(CPU)
    expected = _draws()
    _draws()
    restore_generators(states, CPU)
    assert _draws() == expected


@pytest.mark.parametrize(
    "trouble",
    [
        *(OSError(number, os.strerror(number)) for number in (errno.EIO, errno.ESTALE)),
        *(OSError(number, os.strerror(number)) for number in (errno.EACCES, errno.EMFILE)),
        MemoryError(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("place", [(Path, "read_bytes"), (torch, "load")], ids=["read", "decode"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(
    tmp_path: Path,
    trouble: Exception,
    place: tuple[object, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = _saved_twice(tmp_path)

    def fails(*_: object, **__: object) -> None:
        raise trouble

    for load in (store.load, store.load_or_restart):
        with monkeypatch.context() as patch:
            patch.setattr(*place, fails)
            with pytest.raises(CheckpointError, match="cannot be read now"):
                load()
    state = store.load_or_restart()
    assert state is not None
    assert state["epoch"] == 2
