"""The outbox: what it keeps, what a crash or a damaged disk leaves of it."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import resource
import stat
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tracking.memory import MemoryStore
from topotune.errors import ConfigError, LeaseLostError, OutboxError
from topotune.records import EpochReport, Outcome, Value
from topotune.redaction import redact
from topotune.tracking import outbox as outbox_module
from topotune.tracking.entries import (
    Artifact,
    Body,
    End,
    Entry,
    Epoch,
    Item,
    Metrics,
    Series,
    Start,
    Tags,
    from_payload,
    items,
    size,
    to_payload,
)
from topotune.tracking.lines import MAX_LINE, decode, encode, read_chunk
from topotune.tracking.naming import MAX_TAG, clean_name, clean_tag, clean_text
from topotune.tracking.outbox import (
    OUTBOX_FILE,
    Outbox,
    Piece,
    bodies_of,
    outbox_size,
    read_all,
    read_piece,
)
from topotune.tracking.progress import PROGRESS_FILE, REFUSED_FILE
from topotune.tracking.shipper import Shipper, ShipStatus
from topotune.tracking.store import StoreRefusedError, check_tracking_uri, embedded_store_uri

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def report(epoch: int, loss: float = 0.5) -> EpochReport:
    return EpochReport(epoch, 10 * epoch, {"loss": loss}, 1.5, 1_700_000_000_000 + epoch)


def epoch(number: int, loss: float = 0.5) -> Epoch:
    return Epoch(report(number, loss))


def epochs(search: Path, trial: int = 7) -> list[int]:
    return [body.report.epoch for body in bodies_of(search, trial) if isinstance(body, Epoch)]


def test_records_read_back_as_they_were_written(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    params: dict[str, Value] = {"lr": 0.1, "betas": [0.9, 0.99], "note": None, "flag": True}
    outbox.start(7, params, {"device": "cpu"})
    odd = EpochReport(1, 10, {"a": math.nan, "b": math.inf, "c": -math.inf}, 2.0, 5)
    outbox.put(7, Epoch(odd))
    outbox.metrics(7, {"overhead_vs_adam": 1.25}, 3, 6)
    outbox.end(7, Outcome.DIVERGED, "loss is inf")
    assert {entry.trial for _, entry in read_all(tmp_path)} == {7}
    start, epoch, metrics, end = bodies_of(tmp_path, 7)
    assert isinstance(start, Start)
    assert start.params == {"lr": "0.1", "betas": "[0.9, 0.99]", "note": "None", "flag": "True"}
    assert start.tags == {"device": "cpu", "topotune.outcome": "RUNNING"}
    assert isinstance(epoch, Epoch)
    assert epoch.report.to_json() == odd.to_json()
    assert metrics == Metrics({"overhead_vs_adam": 1.25}, 3, 6)
    assert isinstance(end, End)
    assert (end.outcome, end.reason) == ("DIVERGED", "loss is inf")


def test_an_infinity_becomes_a_point_of_its_own_and_nan_stays(tmp_path: Path) -> None:
    odd = EpochReport(4, 40, {"up": math.inf, "down": -math.inf, "nan": math.nan}, 1.0, 9)
    Outbox(tmp_path).put(7, Epoch(odd))
    ((_, entry),) = read_all(tmp_path)
    points = {item.key: item.value for item in items(entry)}
    assert math.isnan(float(points.pop("nan")))
    assert points == {
        "optimizer_step": 40.0,
        "epoch_seconds": 1.0,
        "up_nonfinite": 1.0,
        "down_nonfinite": -1.0,
    }
    assert {(item.step, item.at) for item in items(entry)} == {(4, 9)}


@pytest.mark.parametrize("reopen", [False, True])
def test_repeating_everything_writes_nothing(tmp_path: Path, reopen: bool) -> None:
    artifact, file = tmp_path / "trials/0007/trace.npz", tmp_path / OUTBOX_FILE
    outbox = Outbox(tmp_path)

    def play(outbox: Outbox) -> None:
        outbox.start(7, {"lr": 0.1}, {"device": "cpu"})
        outbox.put(7, epoch(1))
        outbox.metrics(7, {"x": 1.0}, 0, 5)
        outbox.artifact(7, artifact)

    artifact.parent.mkdir(parents=True)
    artifact.write_bytes(b"trace")
    play(outbox)
    before = file.read_bytes()
    outbox = Outbox(tmp_path) if reopen else outbox
    play(outbox)
    outbox.put(7, epoch(1, loss=99.0))
    assert file.read_bytes() == before
    assert epochs(tmp_path) == [1]
    outbox.metrics(7, {"x": 2.0, "y": 3.0}, 0, 6)
    outbox.metrics(7, {"x": 2.0}, 1, 6)
    artifact.write_bytes(b"another trace")
    outbox.artifact(7, artifact)
    added = file.read_bytes()[len(before) :].splitlines()
    assert [decode(line).get("values") for line in added] == [{"y": 3.0}, {"x": 2.0}, None]


def test_a_restart_after_the_end_is_recorded_and_first_parameters_stand(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.start(7, {"lr": 0.1}, {})
    outbox.end(7, Outcome.FAILED, "node lost")
    outbox.end(7, Outcome.FAILED, "node lost")
    outbox.start(7, {"lr": 0.2, "eta": 1}, {"device": "cuda"})
    outbox.end(7, Outcome.COMPLETE, "")
    bodies = bodies_of(tmp_path, 7)
    assert [type(body).__name__ for body in bodies] == ["Start", "End", "Start", "End"]
    again = bodies[2]
    assert isinstance(again, Start)
    assert again.params == {"eta": "1"}


def test_a_torn_last_line_is_left_by_readers_and_cut_by_the_next_writer(tmp_path: Path) -> None:
    outbox, file = Outbox(tmp_path), tmp_path / OUTBOX_FILE
    outbox.put(7, epoch(1))
    outbox.put(7, epoch(2))
    whole = file.read_bytes()
    keep = whole.index(b"\n") + 1
    for cut in range(keep, len(whole)):
        file.write_bytes(whole[:cut])
        piece = read_piece(tmp_path, 0)
        assert (len(piece.entries), piece.damaged, piece.end) == (1, (), keep)
        resumed = Outbox(tmp_path)
        resumed.put(7, epoch(1))
        resumed.put(7, epoch(2))
        assert file.read_bytes() == whole


def test_a_torn_last_line_is_read_over_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume offers all that is known first: that must not read the file anew each time."""
    outbox, file = Outbox(tmp_path), tmp_path / OUTBOX_FILE
    for number in range(1, 6):
        outbox.put(7, epoch(number))
    file.write_bytes(file.read_bytes() + b"0123")
    reads, read = [], outbox_module.read_pieces

    def watched(folder: Path) -> Iterator[Piece]:
        reads.append(folder)
        return read(folder)

    monkeypatch.setattr(outbox_module, "read_pieces", watched)
    resumed = Outbox(tmp_path)
    for number in range(1, 7):
        resumed.put(7, epoch(number))
    assert len(reads) == 1
    assert epochs(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_damaged_line_in_the_middle_is_counted_and_recorded_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outbox, file = Outbox(tmp_path), tmp_path / OUTBOX_FILE
    for number in (1, 2, 3):
        outbox.put(7, epoch(number))
    data = bytearray(file.read_bytes())
    start = data.index(b"\n") + 1
    data[start + 60] ^= 1
    file.write_bytes(data)
    assert counted(tmp_path).damaged == 1
    assert f"record at byte {start} skipped: checksum" in caplog.text
    assert epochs(tmp_path) == [1, 3]
    resumed = Outbox(tmp_path)
    for number in (1, 2, 3):
        resumed.put(7, epoch(number))
    assert epochs(tmp_path) == [1, 3, 2]


def counted(search: Path) -> ShipStatus:
    """What a shipper counts that has no time to send anything."""
    return Shipper(search, MemoryStore(), "s", "demo").close(0.0)


def test_what_is_recorded_while_much_is_sent_counts_once(tmp_path: Path) -> None:
    outbox, wide = Outbox(tmp_path), {f"m{index}": 0.5 for index in range(5000)}
    for number in range(1, 41):
        outbox.put(7, Metrics(wide, number, number))
    assert outbox_size(tmp_path) > 2 * (1 << 20)  # more pieces than one

    class Busy(MemoryStore):
        def log(self, run_id: str, batch: Sequence[Item]) -> None:
            super().log(run_id, batch)
            at = outbox_size(tmp_path)
            outbox.metrics(7, {"late": 1.0}, at, at)

    shipper = Shipper(tmp_path, Busy(), "s", "demo")
    for _ in range(2):
        assert shipper.ship_once()
        assert (status := shipper.status()).shipped == status.recorded
    assert status.recorded > 40 * len(wide)


@pytest.mark.parametrize("name", [PROGRESS_FILE, REFUSED_FILE])
def test_a_flipped_bit_in_what_a_shipper_remembers_moves_and_hides_nothing(
    name: str, tmp_path: Path
) -> None:
    class Picky(MemoryStore):
        def log(self, run_id: str, batch: Sequence[Item]) -> None:
            if any(item.key == "bad" for item in batch):
                raise StoreRefusedError("no")
            super().log(run_id, batch)

    folder, store = tmp_path / "search", Picky()
    outbox = Outbox(folder)
    for trial in (1, 3):
        outbox.put(trial, epoch(1), Metrics({"bad": 1.0}, 1, 5))
    assert Shipper(folder, store, "s", "demo").ship_once()
    content = (folder / name).read_bytes()
    one, three = store.points
    first = set(store.points[one])
    outbox.put(1, epoch(2))
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    for place in range(len(content)):
        for path, before in kept.items():
            path.write_bytes(before)
        flawed = bytearray(content)
        flawed[place] ^= 2
        (folder / name).write_bytes(flawed)
        shipper = Shipper(folder, store, "s", "demo")
        assert shipper.ship_once()
        assert (shipper.status().refused, shipper.status().pending) == (2, 0)
        assert {run: len(points) for run, points in store.points.items()} == {one: 6, three: 3}
        store.points[one] = set(first)


def test_what_another_writer_left_is_seen(tmp_path: Path) -> None:
    """As after a driver that lost its lease in the middle of a write."""
    first, second = Outbox(tmp_path), Outbox(tmp_path)
    first.put(7, epoch(1))
    second.put(7, epoch(1, loss=2.0))
    second.put(7, epoch(2))
    first.put(7, epoch(2, loss=2.0))
    found = [body.report.metrics for body in bodies_of(tmp_path, 7) if isinstance(body, Epoch)]
    assert found == [{"loss": 0.5}, {"loss": 0.5}]


def test_threads_tear_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)

    def write() -> None:
        for number in range(1, 26):
            outbox.put(7, epoch(number))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert epochs(tmp_path) == list(range(1, 26))
    assert read_piece(tmp_path, 0).damaged == ()


def test_who_lost_the_lease_writes_nothing(tmp_path: Path) -> None:
    def lost() -> None:
        raise LeaseLostError("another driver")

    with pytest.raises(LeaseLostError):
        Outbox(tmp_path, lost).put(7, epoch(1))
    assert not (tmp_path / OUTBOX_FILE).exists()


@pytest.mark.parametrize("reopen", [False, True])
def test_of_an_ended_trial_only_its_end_is_remembered(tmp_path: Path, reopen: bool) -> None:
    outbox = Outbox(tmp_path)
    outbox.start(7, {"lr": 0.1}, {})
    outbox.put(7, epoch(1))
    outbox.end(7, Outcome.PRUNED, "weak", Metrics({"device_seconds": 1.0}, 0, 5))
    outbox.forget(7)
    outbox = Outbox(tmp_path) if reopen else outbox
    assert 7 not in outbox._runs
    assert outbox.has_end(7, Outcome.PRUNED, "weak")
    assert not outbox.has_end(7, Outcome.COMPLETE, "")
    assert not outbox.has_end(8, Outcome.PRUNED, "weak")
    before = (tmp_path / OUTBOX_FILE).read_bytes()
    outbox.put(7, epoch(1))  # it goes on all the same: what it had is looked up
    outbox.end(7, Outcome.PRUNED, "weak")
    assert (tmp_path / OUTBOX_FILE).read_bytes() == before
    outbox.put(7, epoch(2))
    assert epochs(tmp_path) == [1, 2]


def test_what_trials_report_is_forced_to_disk_at_their_end_and_every_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, forced, now = Outbox(tmp_path), list[int](), [0.0]
    outbox.start(7, {}, {})
    monkeypatch.setattr(os, "fsync", forced.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    outbox._forced = 0.0
    for number in range(1, 5):
        outbox.put(7, epoch(number), force=False)
        now[0] += 0.4
    assert len(forced) == 1  # the fourth came 1.2 s after the start
    outbox.put(7, epoch(5), force=False)
    assert len(forced) == 1
    outbox.end(7, Outcome.COMPLETE)
    assert len(forced) == 2
    assert epochs(tmp_path) == [1, 2, 3, 4, 5]


def test_records_of_one_call_are_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[int] = []
    outbox = Outbox(tmp_path)
    outbox.put(7, epoch(1))
    monkeypatch.setattr(os, "fsync", forced.append)
    outbox.put(7, Tags({"a": "b"}, 5), epoch(1), epoch(2), epoch(3))
    assert len(forced) == 1
    assert epochs(tmp_path) == [1, 2, 3]


def test_a_full_disk_leaves_whole_lines_and_the_call_can_be_repeated(tmp_path: Path) -> None:
    outbox, file = Outbox(tmp_path), tmp_path / OUTBOX_FILE
    outbox.put(7, epoch(1))
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))
    try:
        with pytest.raises(OutboxError, match=r"outbox\.jsonl: the record cannot be written.*spa"):
            outbox.put(7, epoch(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    outbox.put(7, epoch(2))
    assert epochs(tmp_path) == [1, 2]


@pytest.mark.parametrize("broken", ["the line", "the folder's entry"])
def test_a_record_that_is_not_forced_to_disk_is_not_written(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(tmp_path)
    if broken == "the line":
        outbox.put(7, epoch(1))
    force = os.fsync

    def fail(handle: int) -> None:  # no disk breaks on demand
        if stat.S_ISDIR(os.fstat(handle).st_mode) == (broken != "the line"):
            raise OSError(errno.EIO, "Input/output error")
        force(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OutboxError, match="the record cannot be written: Input/output error"):
            outbox.put(7, epoch(2))
    assert epochs(tmp_path) == ([1] if broken == "the line" else [])
    outbox.put(7, epoch(2))
    outbox.put(7, epoch(2))
    assert epochs(tmp_path) == ([1, 2] if broken == "the line" else [2])


def test_a_new_folder_is_forced_to_disk_with_its_outbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[Path] = []
    force = os.fsync

    def watch(handle: int) -> None:
        forced.append(Path(f"/proc/self/fd/{handle}").resolve())
        force(handle)

    monkeypatch.setattr(os, "fsync", watch)
    Outbox(tmp_path / "search").put(7, epoch(1))
    path = (tmp_path / "search" / OUTBOX_FILE).resolve()
    assert forced == [path.parents[1], path.parent, path]


def test_what_cannot_be_recorded_says_why(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    outbox = Outbox(tmp_path / "s")
    outside = tmp_path / "outside.txt"
    outside.write_text("x")
    (tmp_path / "s/link.txt").symlink_to(outside)
    for path in (outside, tmp_path / "s/../outside.txt", tmp_path / "s/link.txt"):
        with pytest.raises(OutboxError, match="outside the search folder"):
            outbox.artifact(7, path)
    with pytest.raises(OutboxError, match=r"gone\.txt: cannot be read"):
        outbox.artifact(7, tmp_path / "s/gone.txt")
    with pytest.raises(OutboxError, match="epoch: expected an integer"):
        outbox.put(7, epoch(-1))
    with pytest.raises(OutboxError, match="at most"):
        encode({"x": "y" * MAX_LINE})
    with pytest.raises(OutboxError, match="COMPLETE, FAILED or INTERRUPTED"):
        outbox.end(None, "PRUNED")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutboxError):
        Outbox(tmp_path / "file").put(1, epoch(1))
    assert not (tmp_path / "s" / OUTBOX_FILE).exists()


def test_an_endless_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    good = encode({"kind": "tags", "trial": 7, "tags": {}, "at": 1})
    path.write_bytes(b"x" * (MAX_LINE + 100) + b"\n" + good)
    offset, damaged, lines = 0, 0, 0
    while (chunk := read_chunk(path, offset)).end > offset:
        offset, damaged, lines = chunk.end, damaged + len(chunk.damaged), lines + len(chunk.lines)
    assert (offset, damaged, lines) == (path.stat().st_size, 2, 1)


@FUZZ
@given(st.binary(max_size=400))
def test_reading_arbitrary_bytes_never_raises(tmp_path: Path, data: bytes) -> None:
    (tmp_path / OUTBOX_FILE).write_bytes(data)
    piece = read_piece(tmp_path, 0)
    assert piece.end == data.rfind(b"\n") + 1
    assert piece.entries == ()
    found = counted(tmp_path)
    assert (found.recorded, found.damaged) == (0, data.count(b"\n"))


@FUZZ
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 5))))
def test_an_edited_file_yields_only_what_was_written(
    tmp_path: Path, edits: list[tuple[float, bytes, int]]
) -> None:
    data = b"".join(
        encode({"kind": "tags", "trial": 7, "tags": {"n": str(n)}, "at": n}) for n in range(6)
    )
    genuine = {decode(line)["at"]: decode(line) for line in data.splitlines()}
    for where, insert, remove in edits:
        at = int(where * len(data))
        data = data[:at] + insert + data[at + remove :]
    (tmp_path / "lines").write_bytes(data)
    for line in read_chunk(tmp_path / "lines").lines:
        assert line.payload == genuine[line.payload["at"]]
        assert data[line.start : line.end] == encode(line.payload)


WORDS = (
    "points trial params tags at report values step path folder digest outcome reason epoch metrics"
)
FIELDS = st.sampled_from([*WORDS.split(), "seconds", "timestamp_ms"]) | st.text(max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=8),
    max_leaves=12,
)
KINDS = st.sampled_from(["start", "epoch", "metrics", "series", "tags", "artifact", "end", "x"])


@settings(FUZZ, max_examples=100)
@given(KINDS, st.dictionaries(FIELDS, JSON, max_size=8), st.data())
def test_a_payload_of_any_shape_raises_only_our_error(
    kind: str, payload: dict[str, Any], data: st.DataObject
) -> None:
    numbers = st.dictionaries(st.text(max_size=3), st.integers() | st.sampled_from(["nan", "z"]))
    likely = {
        "at": st.integers(-1, 2**64),
        "tags": st.dictionaries(st.text(max_size=3), st.text(max_size=3)),
        "params": st.dictionaries(st.text(max_size=3), st.text(max_size=3)),
        "values": numbers,
        "points": st.dictionaries(st.text(max_size=3), JSON | st.just([[1, 0.5]])),
        "step": st.integers(-1, 3),
        "path": st.text(max_size=6),
        "outcome": st.sampled_from(["COMPLETE", "odd"]),
    }
    for field, strategy in likely.items():
        if data.draw(st.booleans()):
            payload[field] = data.draw(strategy)
    try:
        entry = from_payload({**payload, "kind": kind})
    except OutboxError:
        return
    for item in items(entry):
        assert clean_name(item.key) == item.key
        if item.kind == "metric":
            assert not math.isinf(float(item.value))
        else:
            assert str(item.value).encode().decode() == item.value


def test_lines_that_pass_the_checksum_but_are_no_strict_json() -> None:
    for body in (b"[" * 100_000, b'{"a":NaN}', b"[]", b'{"a":', b"\xff"):
        with pytest.raises(OutboxError):
            decode(b"%08x %08x %b" % (zlib.crc32(body), len(body), body))
    with pytest.raises(OutboxError, match="strict JSON"):
        encode({"a": math.nan})


@FUZZ
@given(st.text(max_size=300))
def test_clean_names_are_what_mlflow_takes(name: str) -> None:
    clean = clean_name(name)
    assert re.fullmatch(r"[/\w.\- :]{1,250}", clean, re.ASCII)
    assert not {"", ".", ".."} & set(clean.split("/"))
    assert clean_name(clean) == clean


@pytest.mark.parametrize(
    ("one", "two"), [("a$b", "a#b"), ("a/../b", "a/b"), ("x" * 260, "x" * 261), ("/a", "a")]
)
def test_names_that_must_change_stay_apart(one: str, two: str) -> None:
    assert clean_name(one) != clean_name(two)
    assert clean_name("val/accuracy@1") == "val/accuracy_1-" + clean_name("val/accuracy@1")[-8:]


def test_texts_are_cut_and_cleaned() -> None:
    assert clean_text("a\x00b\x1b[31m\ud800\tc", 99) == "a\ufffdb\ufffd[31m\ufffd\tc"
    assert clean_text("x" * 7000, 6000) == "x" * 5999 + "…"
    rows = clean_tag("| a row of a table |\n" * 1000)
    assert len(rows) <= MAX_TAG
    assert rows.endswith("table |\n…")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://me:pa%20ss@host:5000/x failed", "http://***@host:5000/x failed"),
        ("to http://me:p/a@ss@host/x", "to http://***@host/x"),
        ("postgresql+psycopg://u:secret@db/m?sslpassword=k&a=1", None),
        ("x?token=abc&password=def ghi", "x?token=***&password=*** ghi"),
        ("http://host/x by me@home", "http://host/x by me@home"),
    ],
)
def test_addresses_lose_their_secrets(text: str, clean: str | None) -> None:
    expected = clean or "postgresql+psycopg://***@db/m?sslpassword=***&a=1"
    assert redact(text) == expected


def test_secrets_never_enter_an_outbox(tmp_path: Path) -> None:
    address = "http://user:hunter2@host:5000"
    outbox = Outbox(tmp_path)
    outbox.start(7, {"data": address}, {"tracking_uri": address})
    outbox.end(7, Outcome.FAILED, f"cannot reach {address}")
    outbox.tags(None, {"uri": address})
    outbox.end(7, Outcome.FAILED, address)
    assert len(list(read_all(tmp_path))) == 4
    assert b"hunter2" not in (tmp_path / OUTBOX_FILE).read_bytes()


@pytest.mark.parametrize("uri", ["file:///tmp/x", "/tmp/x", "ftp://u:hunter2@host", "http:", ""])
def test_addresses_that_mlflow_does_not_serve_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="its scheme must be one of") as caught:
        check_tracking_uri(uri)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:99999",
        "http://host:0/x",
        "https://u:hunter2@host:65536/",
        "http://[::1]:70000",
        "http://host:port",
        "postgresql+psycopg://u:hunter2@db:99999/m",
    ],
)
def test_ports_that_no_host_has_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="its port must be a number from 1 to 65535") as caught:
        check_tracking_uri(uri)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("uri", ["http://[::1]/", "http://[::1]:5000", "https://u:p@h:65535/x"])
def test_hosts_and_ports_that_can_be_are_taken(uri: str) -> None:
    assert check_tracking_uri(uri) == uri


def test_store_addresses() -> None:
    assert check_tracking_uri("postgresql+psycopg://u:p@db/m") == "postgresql+psycopg://u:p@db/m"
    assert embedded_store_uri(Path("/data/a b#ü")) == "sqlite:////data/a b#ü/mlflow/mlflow.db"
    for odd in ("/data/what?", "/data/50%"):
        with pytest.raises(ConfigError, match="Choose another --results-dir"):
            embedded_store_uri(Path(odd))


def test_workers_do_not_import_mlflow() -> None:
    code = (
        "import sys, topotune.tracking.outbox, topotune.tracking.shipper, topotune.tracking.mlflow;"
        "print(sorted({'mlflow', 'torch', 'ray', 'sqlalchemy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_line_is_checksum_length_and_json() -> None:
    payload: Mapping[str, Any] = {"kind": "tags", "name": "ü\n"}
    crc, length, body = encode(payload)[:-1].split(b" ", 2)
    assert int(crc, 16) == zlib.crc32(body)
    assert int(length, 16) == len(body)
    assert json.loads(body) == payload
    assert encode(payload).count(b"\n") == 1


def test_a_clock_that_is_set_back_stamps_nothing_before_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Outbox(tmp_path).start(7, {}, {})
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 3600 * 10**9)
    again = Outbox(tmp_path)
    again.end(7, Outcome.PRUNED, "stopped")
    again.start(7, {}, {"attempt": "2"})
    again.end(7, Outcome.COMPLETE, "")
    stamps = [entry.at for _, entry in read_all(tmp_path)]
    assert len(stamps) == 4
    assert all(before < after for before, after in pairwise(stamps))


@pytest.mark.parametrize(
    "body",
    [
        Start({"lr": "0.1", "eta": "1"}, {"device": "cpu"}, 1),
        Tags({"a": "b"}, 1),
        epoch(1),
        Epoch(EpochReport(1, 1, {"epoch_seconds": 2.0, "loss": math.inf}, 0.1, 1)),
        Metrics({"a": 1.0, "b": math.inf}, 0, 1),
        Series({"loss": [(1, 0.5), (9, math.inf)], "energy": [(9, math.nan)]}, 1),
        Artifact("trials/0000/trace.npz", "", "00", 1),
        End("COMPLETE", "", 1),
    ],
    ids=lambda body: type(body).__name__,
)
def test_a_record_counts_its_items(body: Body) -> None:
    entry = Entry(7, body)
    more = isinstance(body, Artifact | End)
    assert size(entry) == len(list(items(entry))) + more
    assert repr(from_payload(decode(encode(to_payload(entry))[:-1])).body) == repr(body)


def test_a_series_is_known_by_its_last_step(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    first, second = (
        Series({"loss": [(10 * n - 5, 2.0 / n), (10 * n, 1.0 / n)]}, n) for n in (1, 2)
    )
    for _ in range(2):
        outbox.put(7, first)
        outbox.put(7, first, second)
        outbox = Outbox(tmp_path)
        outbox.put(7, second, Series({}, 3))
    assert bodies_of(tmp_path, 7) == [first, second]
    points = [(item.key, item.step) for _, entry in read_all(tmp_path) for item in items(entry)]
    assert points == [("step/loss", step) for step in (5, 10, 15, 20)]
