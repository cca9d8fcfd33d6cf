"""One driver a search: on one machine at once, across machines by the beat of the lease."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.search_cases import make_config
from topotune.errors import LeaseLostError, ResourceError, SearchFolderError
from topotune.search import driver
from topotune.search.place import lease as module
from topotune.search.place.folder import SearchFolder
from topotune.search.place.lease import FileLease, lease_holder
from topotune.search.ray.cluster import Cluster, Node
from topotune.search.status import all_status


def foreign(path: Path, token: str = "theirs", beat: int = 3) -> None:
    """What a driver on another machine writes."""
    holder = {"pid": 41, "host": "elsewhere", "machine": "m", "token": token, "beat": beat}
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(holder).ljust(511) + "\n")
    partial.replace(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "EXPIRY_SECONDS", 1.0)
    monkeypatch.setattr(module, "_FRESH_SECONDS", 0.1)


def test_the_holder_beats_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "driver.lock"
    with FileLease(path) as lease:
        first = json.loads(path.read_text())["beat"]
        deadline = time.monotonic() + 20
        while json.loads(path.read_text())["beat"] < first + 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        lease.check(force=True)
    assert path.read_text() == ""
    assert lease_holder(path) is None


def test_a_dead_holder_on_another_machine_is_replaced_after_watching(tmp_path: Path) -> None:
    path = tmp_path / "driver.lock"
    foreign(path)
    assert lease_holder(path) == "pid 41 on elsewhere, if it still lives"
    notes: list[str] = []
    began = time.monotonic()
    with FileLease(path, notes.append) as lease:
        assert time.monotonic() - began >= 1.0
        lease.check(force=True)
    assert "pid 41 on elsewhere left its lease" in notes[0]
    assert "is dead; taking over" in notes[1]


def test_a_living_holder_on_another_machine_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "driver.lock"
    foreign(path)
    over = threading.Event()

    def beat() -> None:
        number = 3
        while not over.wait(0.05):
            number += 1
            foreign(path, beat=number)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(SearchFolderError, match="driven by pid 41 on elsewhere"),
            FileLease(path),
        ):
            pass
    finally:
        over.set()
        thread.join()
    assert "elsewhere" in path.read_text()  # nothing of it was touched


def test_who_was_replaced_is_told_and_touches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "driver.lock"
    with FileLease(path) as lease:
        foreign(path)
        time.sleep(0.3)  # longer than a look is trusted, and three beats
        with pytest.raises(LeaseLostError, match="taken over by pid 41 on elsewhere"):
            lease.check()
        with pytest.raises(LeaseLostError):
            lease.check()
    assert json.loads(path.read_text())["token"] == "theirs"


def test_a_dead_holder_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "driver.lock"
    foreign(path)
    mine = json.loads(path.read_text()) | {"machine": module.this_machine()}
    path.write_text(json.dumps(mine).ljust(511) + "\n")  # killed: the kernel dropped its lock
    notes: list[str] = []
    with FileLease(path, notes.append):
        pass
    assert notes == []


@pytest.mark.parametrize("content", ["", "pid 12 on host\n", "{", '{"pid": 1}', "[]", "\x00" * 512])
def test_content_that_names_nobody_holds_nobody_up(content: str, tmp_path: Path) -> None:
    path = tmp_path / "driver.lock"
    path.write_text(content)
    assert lease_holder(path) is None
    with FileLease(path) as lease:
        lease.check(force=True)


def test_a_lease_that_cannot_be_looked_at_ends_no_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        SearchFolder.create(tmp_path, make_config(name=name), "")
    lock = tmp_path / "first/driver.lock"
    lock.mkdir()
    said: list[str] = []
    assert [found.config.name for found in all_status(tmp_path, said.append)] == ["second"]
    assert "driver.lock: cannot be read: Is a directory" in said[0]
    lock.rmdir()
    lock.touch()
    look = Path.open

    def refused(path: Path, *arguments: Any, **options: Any) -> Any:  # as everybody but root is
        if path == lock:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    assert [found.config.name for found in all_status(tmp_path, said.append)] == ["second"]
    assert "driver.lock: cannot be read: Permission denied. Give" in said[1]


@pytest.mark.parametrize("left", ["empty", "missing", "unreadable"])
def test_who_slept_through_a_whole_other_driver_has_lost_it(left: str, tmp_path: Path) -> None:
    path = tmp_path / "driver.lock"
    with FileLease(path) as lease:
        if left == "missing":
            path.unlink()
        else:
            path.write_text("" if left == "empty" else "\x00" * 512)
        time.sleep(0.3)  # longer than a look is trusted, and three beats
        with pytest.raises(LeaseLostError, match="a driver that has ended since"):
            lease.check()
    assert not path.exists() or path.read_text().strip("\x00") == ""  # nothing was written back


def test_a_beat_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "driver.lock"
    failed = threading.Event()
    with FileLease(path):

        def full(*_: object) -> None:
            failed.set()
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            assert failed.wait(20)
        before = json.loads(path.read_text())["beat"]
        deadline = time.monotonic() + 20
        while json.loads(path.read_text())["beat"] < before + 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_lease_that_cannot_be_written_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    lease = FileLease(tmp_path / "driver.lock")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", exhausted)
        with pytest.raises(ResourceError, match="cannot be written: Too many open files"):
            lease._write()


class NoRay:
    """Stands for a running Ray."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> NoRay:
        return self

    def __exit__(self, *_: object) -> None: ...

    def hosts(self) -> int:
        return 1

    def cluster(self) -> Cluster:
        return Cluster((Node({"CPU": 2.0}, {"CPU": 2.0}),))


class Deaf:
    """A listener that does nothing."""

    def note(self, text: object) -> None: ...

    tick = ended = note


def test_of_two_commands_that_begin_one_search_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    folder = SearchFolder(tmp_path / "demo")
    monkeypatch.setattr(driver, "RaySession", NoRay)

    def meanwhile(*_: object) -> None:
        """The other command comes as far as its lease while this one checks the search."""
        folder.root.mkdir()
        (folder.root / "search.json.partial").touch()
        other.__enter__()

    other = FileLease(folder.lock)
    monkeypatch.setattr(driver, "preflight", meanwhile)
    with pytest.raises(SearchFolderError, match=f"driven by pid {os.getpid()}"):
        driver.start(config, "", tmp_path, Deaf())
    assert not folder.meta.exists()

    def finished(*_: object) -> None:
        """The other command has ended by the time this one gets the lease."""
        SearchFolder.create(tmp_path, make_config(seed=9), "")
        other.__exit__()

    monkeypatch.setattr(driver, "preflight", finished)
    with pytest.raises(SearchFolderError, match="another search named 'demo'"):
        driver.start(config, "", tmp_path, Deaf())
    assert folder.config().seed == 9
