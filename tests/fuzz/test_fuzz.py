"""Broken files bring out our errors only: a run of the fuzzer, and what it once found.

``pytest -m fuzz --table`` gives the readers 100,000 inputs; the default run, 2,000.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuzz.inputs import (
    Mutator,
    checked_lines,
    journal,
    records,
    space_files,
    study_records,
)
from tests.fuzz.readers import TARGETS, run, table, try_one
from tests.tables import text
from topotune.config.file import MAX_BYTES
from topotune.tracking.outbox import OUTBOX_FILE, read_all

SPEC = b"task: digits\nmethod: adam\nepochs: 3\nseed: 1\n"
SPACE = b"""name: a
task: digits
method: adam
space: {lr: {type: float, low: LOW, high: 1}}
objective: {metric: val_loss, direction: minimize}
budget: {trials: 1}
"""
ONCE_FAILED = [
    ("exported config", SPEC + b"params: {lr: .nan}\n"),
    ("exported config", SPEC + b"train: {grad_clip: .inf}\n"),
    ("search file", SPACE.replace(b"LOW", b"-1" + b"0" * 320)),
    ("search file", SPACE.replace(b"LOW", b"0") + b"fixed: {eta: .nan}\n"),
    ("search file", SPACE.replace(b"LOW", b"0").replace(b"trials: 1", b"wall_clock: .inf")),
    ("results folder", b'{"store": "store", "offset": Infinity, "crc": 0}'),
    (
        "results folder",
        b'{"store": "store", "offset": 0, "crc": 0, "runs": {}, "ended": {"0": Infinity}}',
    ),
    ("results folder", b"[" * 100_000),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A broken outbox is logged line by line."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.fuzz
@pytest.mark.timeout(7200)
def test_only_our_errors_come_out_of_many_inputs(
    tmp_path: Path, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    options = request.config.option
    found = run(options.inputs, options.seed, tmp_path)
    record_property("table", text(table(found)))
    assert [record.failures for record in found] == [[]] * len(TARGETS)


def test_only_our_errors_come_out(tmp_path: Path) -> None:
    found = run(2000, 7, tmp_path)
    assert [record.failures for record in found] == [[]] * len(TARGETS)
    assert sum(record.inputs for record in found) == 2000
    taken = {record.target: record.inputs - record.refused for record in found}
    assert taken["search file"] > 20  # not so broken that nothing is ever read
    assert taken["exported config"] > 20
    assert taken["outbox"] == 500  # a reader skips what is damaged, whatever it is


@pytest.mark.parametrize(("target", "data"), ONCE_FAILED, ids=lambda value: str(value)[:40])
def test_what_once_failed_is_refused(target: str, data: bytes, tmp_path: Path) -> None:
    assert not try_one(target, data, tmp_path)


def test_a_study_of_records_that_optuna_stumbles_over_is_refused(tmp_path: Path) -> None:
    assert try_one("study", journal(study_records()), tmp_path)
    for place, change in ((4, {"distribution": "{"}), (11, {"values": [10**400]}), (0, {"x": 1})):
        lines = study_records()
        lines[place] |= change
        assert try_one("study", journal(lines), tmp_path) == ("x" in change)


def test_the_fuzzer_finds_a_reader_that_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(data: bytes, _folder: Path) -> None:
        data.decode()

    monkeypatch.setattr("tests.fuzz.readers.TARGETS", {"outbox": (careless, 1.0)})
    (record,) = run(300, 1, tmp_path)
    assert [failure.error.partition(" ")[0] for failure in record.failures] == [
        "UnicodeDecodeError"
    ]
    with pytest.raises(UnicodeDecodeError):
        try_one("outbox", record.failures[0].data, tmp_path)


def test_inputs_repeat_for_a_seed() -> None:
    raw = space_files()[0]
    first, second = (Mutator(3).damage(raw, raw) for _ in range(2))
    assert first == second != raw
    line = records()[2]
    assert Mutator(3).reshape(line) != line


def test_the_seed_outbox_is_a_real_one(tmp_path: Path) -> None:
    (tmp_path / OUTBOX_FILE).write_bytes(checked_lines(records()))
    assert len(list(read_all(tmp_path))) == len(records())


@pytest.mark.parametrize(
    "piece",
    [b"[", b"1,\n", b"a: 1\n", b"- &a x\n", b"{a: ", b"? ", b"- ", b"\n", b"'", b"[],", b"#"],
    ids=repr,
)
def test_the_largest_file_takes_seconds(piece: bytes, tmp_path: Path) -> None:
    data = b"[" + piece * ((MAX_BYTES - 1) // len(piece))
    began = time.perf_counter()
    assert not try_one("search file", data, tmp_path)
    assert time.perf_counter() - began < 20  # two seconds at most on a quiet machine
