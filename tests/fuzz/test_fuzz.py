"""Broken files bring out our errors only: a run of the fuzzer, and what it once found.

``pytest -m fuzz --table`` gives the readers 100,000 inputs; the default run, 2,000.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuzz.inputs import Mutator, space_files, spool, spool_lines, trial_record
from tests.fuzz.readers import TARGETS, run, table, try_one
from tests.tables import text
from topotune.config.file import MAX_BYTES
from topotune.search.study.trialfile import read_copies
from topotune.tracking.tails import read_all

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
    ("results folder", b'{"wall_seconds": 1' + b"0" * 330 + b', "trials": {}}'),
    ("results folder", b'{"store": "store", "spools": {"a": [Infinity, 0, 0, 0]}}'),
    (
        "results folder",
        b'{"store": "store", "spools": {}, "runs": {}, "ended": {"0": [Infinity, 1]}}',
    ),
    ("results folder", b"[" * 100_000),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A broken spool is logged line by line."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.fuzz
@pytest.mark.timeout(7200)
def test_only_our_errors_come_out_of_many_inputs(
    tmp_path: Path, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    options = request.config.option
    records = run(options.inputs, options.seed, tmp_path)
    record_property("table", text(table(records)))
    assert [record.failures for record in records] == [[]] * len(TARGETS)


def test_only_our_errors_come_out(tmp_path: Path) -> None:
    records = run(2000, 7, tmp_path)
    assert [record.failures for record in records] == [[]] * len(TARGETS)
    assert sum(record.inputs for record in records) == 2000
    taken = {record.target: record.inputs - record.refused for record in records}
    assert taken["search file"] > 20  # not so broken that nothing is ever read
    assert taken["exported config"] > 20
    assert taken["spool"] == 500  # a reader skips what is damaged, whatever it is


@pytest.mark.parametrize(("target", "data"), ONCE_FAILED, ids=lambda value: str(value)[:40])
def test_what_once_failed_is_refused(target: str, data: bytes, tmp_path: Path) -> None:
    assert not try_one(target, data, tmp_path)


def test_a_trial_record_that_once_failed_is_as_none(tmp_path: Path) -> None:
    record = {**trial_record(), "values": [10**400]}
    assert try_one("trial record", spool([record]), tmp_path)
    assert read_copies(tmp_path) == {}
    assert try_one("trial record", spool([trial_record()]), tmp_path)
    assert list(read_copies(tmp_path)) == [0]


def test_the_fuzzer_finds_a_reader_that_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(data: bytes, _folder: Path) -> None:
        data.decode()

    monkeypatch.setattr("tests.fuzz.readers.TARGETS", {"spool": (careless, 1.0)})
    (record,) = run(300, 1, tmp_path)
    assert [failure.error.partition(" ")[0] for failure in record.failures] == [
        "UnicodeDecodeError"
    ]
    with pytest.raises(UnicodeDecodeError):
        try_one("spool", record.failures[0].data, tmp_path)


def test_inputs_repeat_for_a_seed() -> None:
    raw = space_files()[0]
    first, second = (Mutator(3).damage(raw, raw) for _ in range(2))
    assert first == second != raw
    line = spool_lines()[2]
    assert Mutator(3).reshape(line) != line


def test_the_seed_spool_is_a_real_one(tmp_path: Path) -> None:
    path = tmp_path / "trials/0000/spool.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(spool(spool_lines()))
    assert len(list(read_all(tmp_path, "trials/0000/spool.jsonl"))) == len(spool_lines())


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
