"""Searches in an object store, against a real S3 server on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_server import CREDENTIALS, ObjectServer
from topotune.errors import ConfigError, LeaseLostError, ResourceError
from topotune.search.place.objects import layout
from topotune.search.place.objects.address import (
    SCRATCH,
    StoreAddress,
    results_folder,
    shown_place,
    store_address,
)
from topotune.search.place.objects.courier import KEEP_SECONDS, Courier, sweep
from topotune.search.place.objects.pull import fetch
from topotune.search.place.objects.store import ObjectStore, connect
from topotune.search.place.output import Output

FAST = 3.0


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as running:
        yield running


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))


@pytest.fixture
def place(server: ObjectServer, tmp_path: Path) -> str:
    """A prefix of the test's own, with a space in it."""
    server.bucket("bucket")
    return server.address(f"bucket/my results/{tmp_path.name}")


@pytest.fixture
def store(place: str) -> ObjectStore:
    return ObjectStore(StoreAddress.parse(place), limit=FAST)


class Node:
    """A machine with a scratch folder of its own."""

    def __init__(
        self, place: str, home: Path, monkeypatch: pytest.MonkeyPatch, name: str = "demo"
    ) -> None:
        self._address, self._home, self._patch, self._name = place, home, monkeypatch, name

    def worker(self, number: int = 0) -> Courier:
        self._patch.setenv(SCRATCH, str(self._home))
        return Courier(StoreAddress.parse(self._address), self._name, number, lambda: None)


def test_objects_are_written_read_listed_and_deleted(store: ObjectStore, tmp_path: Path) -> None:
    assert store.objects() == {}
    assert store.read("a b/c.txt") is None
    assert not store.download("a b/c.txt", tmp_path / "c.txt")
    store.write("a b/c.txt", b"one")
    store.write("a b/d/e.txt", b"")
    store.write("top.txt", b"three")
    assert store.objects("a b") == {"c.txt": 3, "d/e.txt": 0}
    assert store.folders() == ["a b"]
    assert store.download("a b/c.txt", tmp_path / "deep" / "c.txt")
    assert (tmp_path / "deep" / "c.txt").read_bytes() == b"one"
    assert store.read("a b/d/e.txt") == b""
    (tmp_path / "new").write_bytes(b"new")
    assert store.upload(tmp_path / "new", "a b/c.txt")
    assert not store.upload(tmp_path / "absent", "a b/c.txt")
    assert store.read("a b/c.txt") == b"new"
    store.delete("a b/c.txt")
    store.delete("a b/c.txt")
    store.delete_folder("a b")
    store.delete_folder("nowhere")
    assert list(store.objects()) == ["top.txt"]
    store.check()
    assert list(store.objects()) == ["top.txt"]


def test_a_store_that_is_away_is_waited_for(
    server: ObjectServer, place: str, tmp_path: Path
) -> None:
    told: list[str] = []
    beats: list[float] = []
    store = ObjectStore(
        StoreAddress.parse(place), told.append, 60.0, lambda: beats.append(time.monotonic())
    )
    store.write("kept", b"before")
    server.gate.close()
    threading.Timer(4.0, server.gate.open).start()
    store.write("kept", b"after")
    assert store.read("kept") == b"after"
    assert told[0].startswith(f"the object store {store.address} does not answer, waiting: ")
    assert told[-1] == "the object store is back; going on"
    assert len(beats) >= 3


def test_a_store_that_stays_away_is_an_error_within_its_limit(
    server: ObjectServer, place: str
) -> None:
    store = ObjectStore(StoreAddress.parse(place), limit=1.0)
    server.gate.close()
    began = time.monotonic()
    try:
        with pytest.raises(ResourceError, match=r"cannot write x, for \d+ s now: .*go on when"):
            store.write("x", b"x")
        assert time.monotonic() - began < 15
        store.limit, store.stopping = 600.0, lambda: True
        with pytest.raises(ResourceError, match="cannot read x"):
            store.read("x")
    finally:
        server.gate.open()


def test_a_connection_that_breaks_in_an_upload_leaves_the_old_object_or_the_new(
    server: ObjectServer, place: str
) -> None:
    """In parts and in one: what a half-written upload leaves is never taken for the whole."""
    old, new = b"old" * 100, os.urandom(32 << 20)
    for cut in (1 << 20, 11 << 20, 25 << 20):
        store = ObjectStore(StoreAddress.parse(place), limit=0.0)
        store.write("big", old)
        server.gate.passed, server.gate.cut_after = 0, cut
        with pytest.raises(ResourceError, match="cannot write big"):
            store.write("big", new)
        server.gate.open()
        store.limit = 60.0  # it may keep a connection that broke without its notice
        assert store.read("big") == old
        del store
        assert ObjectStore(StoreAddress.parse(place)).read("big") == old
    store = ObjectStore(StoreAddress.parse(place), limit=60.0)
    server.gate.passed, server.gate.cut_after = 0, 11 << 20
    threading.Timer(3.0, server.gate.open).start()
    store.write("big", new)
    assert store.read("big") == new


def test_a_process_that_is_killed_in_an_upload_leaves_the_old_object(
    server: ObjectServer, place: str
) -> None:
    store = ObjectStore(StoreAddress.parse(place))
    store.write("big", b"old")
    code = f"""
        import os
        from topotune.search.place.objects.address import StoreAddress
        from topotune.search.place.objects.store import ObjectStore
        store = ObjectStore(StoreAddress.parse({place!r}))
        store.read("big")
        print("ready", flush=True)
        store.write("big", os.urandom(64 << 20))
    """
    server.gate.passed = 0
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    while server.gate.passed < 12 << 20:
        time.sleep(0.005)
    process.kill()
    process.wait()
    process.stdout.close()
    assert store.read("big") == b"old"


def test_what_waiting_does_not_mend_is_told_at_once(server: ObjectServer) -> None:
    store = ObjectStore(StoreAddress.parse(server.address("no-such-bucket/x")), limit=600.0)
    with pytest.raises(ResourceError, match=r"cannot write a: .*NO_SUCH_BUCKET.*credentials"):
        store.write("a", b"a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3://key:secret-w0rd@bucket/x", "must not hold a user or password. Set AWS_ACCESS"),
        ("gs://me:secret-w0rd@bucket/x", "Set GOOGLE_APPLICATION_CREDENTIALS"),
        ("s3:///x", "needs a bucket"),
        ("s3://bucket/a/../b", "'..'"),
        ("s3://bucket/a//b", "empty part"),
        ("s3://bucket/x?access_key=secret-w0rd", "has no option 'access_key'. Known ones are re"),
        ("s3://bucket/x?region=", "has no option 'region'"),
        ("ftp://bucket/x", r"must begin with s3:// or gs:// \(got ftp://\)"),
        ("s3://[bucket/x", "is not an address"),
    ],
)
def test_an_address_that_is_none_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StoreAddress.parse(text)
    assert words.replace("\\", "") in str(caught.value)
    assert "secret-w0rd" not in str(caught.value)


def test_an_address_keeps_its_form(tmp_path: Path) -> None:
    text = "s3://bucket/my%20results?endpoint_override=http://127.0.0.1:9000&region=us-east-1"
    address = StoreAddress.parse(text)
    assert str(address) == text
    assert StoreAddress.parse(str(address)) == address
    assert address.root == "bucket/my results"
    assert address.place == "s3://bucket/my%20results"
    assert str(StoreAddress.parse("s3://bucket/a/b/")) == "s3://bucket/a/b"
    folder = results_folder(text)
    assert store_address(folder) == address
    assert shown_place(folder) == f"'{text}'"
    assert results_folder("some/where") == Path("some/where")
    assert store_address(tmp_path) is None


def test_a_mark_in_a_folder_from_elsewhere_sends_nothing(tmp_path: Path) -> None:
    mine = results_folder("s3://bucket/a")
    foreign = tmp_path / "stores" / mine.name
    foreign.mkdir(parents=True)
    (foreign / "address").write_text("s3://bucket/a\n")
    assert store_address(foreign) is None
    (mine / "address").write_text("s3://another/place\n")
    assert store_address(mine) is None


def test_an_address_of_google_is_one_of_arrows_own_filesystem() -> None:
    """Not run against a server: only that Arrow takes the address and its options."""
    from pyarrow.fs import GcsFileSystem

    address = StoreAddress.parse("gs://bucket/pre/fix?scheme=http&endpoint_override=127.0.0.1:9")
    assert address.root == "bucket/pre/fix"
    assert isinstance(connect(address), GcsFileSystem)


def test_every_file_has_one_writer() -> None:
    driver = (
        *("search.json", "search.yaml", "study.jsonl", "outbox.jsonl", "leaderboard.json"),
        *("leaderboard.md", "history.png", "curves.png", "shipped.json", "refused.jsonl"),
        "trials/0007/trace.npz",
        *("trials/0007/relaxation.npz", "trials/0007/crash-1.txt"),
        "sources/1/git.diff",
        *("sources/1/source.json", "sources/1/code/own_parts/inner.py"),
    )
    worker = (
        *("checkpoint.pt", "error.txt", "guard.txt"),
        *("trace/epoch-00001.npz", "relaxation/epoch-00002.npz", "output.txt"),
    )
    nobody = (
        *("driver.lock", ".shipper.lock", ".shipped.json.12.tmp", "study.db"),
        *(
            "live.json.partial",
            "study.copy.jsonl",
            "study.damaged-1.jsonl",
            "driver.claim",
            "../search.json",
        ),
        "trials/0007/checkpoint.previous.pt",
        *("trials/0007/hang.txt", "trials/0007/trace.used/epoch-00001.npz", "/etc/passwd"),
        *("trials/0007/worker.claim", "trials/0007/checkpoint.pt.partial", "a/../../b"),
    )
    for name in driver:
        assert layout.of_driver(name), name
        trial = layout.split_trial(name)
        assert trial is None or not layout.of_worker(trial[1]), name
    for name in worker:
        assert layout.of_worker(name), name
        assert not layout.of_driver(f"trials/0007/{name}"), name
    assert not layout.for_driver("output.txt")  # until somebody asks for it
    for name in nobody:
        assert not layout.of_driver(name), name
        trial = layout.split_trial(name)
        assert trial is None or not layout.of_worker(trial[1]), name


def test_a_trial_goes_on_where_the_store_has_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = (Node(place, tmp_path / name, monkeypatch) for name in ("a", "b"))
    first = here.worker()
    first.fetch()
    (first.folder / "checkpoint.pt").write_text("epoch 1")
    (first.folder / "checkpoint.previous.pt").write_text("epoch 0")
    (first.folder / "error.txt").write_text("one\n")
    first.push()
    (first.folder / "checkpoint.pt").write_text("epoch 2")  # killed before it was sent
    second = there.worker()
    second.fetch()
    assert (second.folder / "checkpoint.pt").read_text() == "epoch 1"
    assert not (second.folder / "checkpoint.previous.pt").exists()
    (second.folder / "checkpoint.pt").write_text("epoch 2 of another node")
    (second.folder / "error.txt").write_text("one\ntwo\n")
    second.push()
    with pytest.raises(LeaseLostError, match=r"trials/0000 was taken over by pid \d+ on "):
        first.push()  # an orphan
    third = here.worker()  # back on the first node, whose folder is behind now
    third.fetch()
    assert (third.folder / "checkpoint.pt").read_text() == "epoch 2 of another node"
    assert (third.folder / "error.txt").read_text() == "one\ntwo\n"
    assert not (third.folder / "checkpoint.previous.pt").exists()


def test_a_node_that_has_more_than_the_store_goes_on_from_that(
    place: str, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(place, tmp_path / "a", monkeypatch)
    first = node.worker()
    first.fetch()
    (first.folder / "error.txt").write_text("one\n")
    first.push()
    (first.folder / "error.txt").write_text("one\ntwo\n")  # killed here
    again = node.worker()
    again.fetch()
    assert (again.folder / "error.txt").read_text() == "one\ntwo\n"
    again.push()
    assert store.read("demo/trials/0000/error.txt") == b"one\ntwo\n"
    with pytest.raises(LeaseLostError):
        first.push()


def test_a_kill_while_files_come_leaves_no_mixture(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = (Node(place, tmp_path / name, monkeypatch) for name in ("a", "b"))
    first = here.worker()
    first.fetch()
    (first.folder / "checkpoint.pt").write_text("old")
    (first.folder / "error.txt").write_text("old\n")
    first.push()
    second = there.worker()
    second.fetch()
    for name in ("checkpoint.pt", "error.txt"):
        (second.folder / name).write_text("new and longer\n")
    second.push()
    third = here.worker()
    real = ObjectStore.download

    def dies(self: ObjectStore, name: str, path: Path) -> bool:
        if name.endswith("error.txt"):
            raise KeyboardInterrupt
        return real(self, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "download", dies)
        with pytest.raises(KeyboardInterrupt):
            third.fetch()
    fourth = here.worker()
    fourth.fetch()
    for name in ("checkpoint.pt", "error.txt"):
        assert (fourth.folder / name).read_text() == "new and longer\n"


def test_an_epoch_goes_in_an_order_that_every_crash_is_survived_by(
    place: str, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    courier = Node(place, tmp_path / "a", monkeypatch).worker()
    courier.fetch()
    (courier.folder / "trace").mkdir()
    for name in ("error.txt", "checkpoint.pt", "trace/epoch-00001.npz"):
        (courier.folder / name).write_text(name)
    sent: list[str] = []
    real = ObjectStore.upload

    def noted(self: ObjectStore, path: Path, name: str) -> bool:
        sent.append(name.removeprefix("demo/trials/0000/"))
        return real(self, path, name)

    monkeypatch.setattr(ObjectStore, "upload", noted)
    courier.push()
    assert sorted(sent[:2]) == ["error.txt", "trace/epoch-00001.npz"]
    assert sent[2:] == ["checkpoint.pt"]
    sent.clear()
    courier.push()
    assert not sent
    (courier.folder / "error.txt").write_text("more")
    courier.push()
    assert sent == ["error.txt"]


def test_a_node_keeps_no_trial_that_is_in_the_store(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(place, tmp_path / "a", monkeypatch)
    courier = node.worker(1)
    courier.fetch()
    (courier.folder / "error.txt").write_text("one\n")
    courier.close()
    assert courier.folder.exists()  # not sent: it stays
    courier = node.worker(1)
    courier.fetch()
    courier.push()
    courier.close()
    assert not courier.folder.exists()
    assert not list((courier.search / ".state").iterdir())
    used, left = node.worker(2), node.worker(3)
    for one in (used, left):
        one.fetch()
        (one.folder / "error.txt").write_text("x\n")
    os.close(left._lock or 0)  # its process is dead
    left._lock = None
    assert sweep() == []
    assert sweep(time.time() + KEEP_SECONDS + 60) == [left.folder]
    assert used.folder.exists()
    used.close()


def test_a_crash_note_is_sent_by_the_process_that_ends_itself(
    place: str, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    courier = Node(place, tmp_path / "a", monkeypatch).worker()
    courier.fetch()
    (courier.folder / "guard.txt").write_text("")
    courier.push()
    assert store.read("demo/trials/0000/guard.txt") is None
    (courier.folder / "guard.txt").write_text("Memory: 2 GiB resident, limit 1 GiB\n")
    courier.send_note()
    assert store.read("demo/trials/0000/guard.txt") == b"Memory: 2 GiB resident, limit 1 GiB\n"
    courier.close()


def test_what_a_trial_prints_is_stored_with_each_epoch_and_goes_on_elsewhere(
    place: str, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWN_TOKEN", "hunter2hunter2")
    stored = "demo/trials/0000/output.txt"
    for node, words in (("a", b"one hunter2hunter2\n"), ("b", b"two\n")):
        courier = Node(place, tmp_path / node, monkeypatch).worker()
        courier.fetch()
        output = Output(courier.folder)
        courier.push()  # nothing was printed yet
        assert store.read(stored) == (None if node == "a" else b"one ***\n")
        os.write(1, words)
        output.tidy()
        courier.push()
        output.close()
        courier.close()
        assert not courier.folder.exists()  # the store has all of it
    assert store.read(stored) == b"one ***\ntwo\n"
    root = tmp_path / "reader"
    monkeypatch.setenv(SCRATCH, str(root))
    fetch(results_folder(place), "demo", "output.txt", "error.txt", trial=0)
    (found,) = root.rglob("output.txt")
    assert found.read_bytes() == b"one ***\ntwo\n"
