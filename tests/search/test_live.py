"""What a driver leaves for 'topotune status' to read while it lives."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.search_cases import Desk, make_config
from topotune.errors import LeaseLostError
from topotune.search import live as module
from topotune.search.drive.book import Book
from topotune.search.live import Live, LiveFile
from topotune.search.place.lease import FileLease
from topotune.search.ray.cluster import Cluster, Node
from topotune.search.ray.pulse import Pulse
from topotune.search.status import status
from topotune.search.study.store import Handout
from topotune.search.view import RunningTrial, SearchView

ME = f"pid {os.getpid()} on {socket.gethostname()}"


def view(waiting: str = "", epoch: int = 1) -> SearchView:
    running = (RunningTrial(3, epoch, (), {}), RunningTrial(4, 0, (), {}, holds=False))
    return SearchView("demo", "running", {}, 6, 4, running=running, waiting=waiting)


def test_the_file_is_written_on_change_and_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    path = tmp_path / "live.json"
    file = LiveFile(path)
    file.show(view())
    first = path.stat().st_mtime_ns
    clock[0] += 2 * module.WRITE_EVERY
    file.show(view())  # nothing new
    assert path.stat().st_mtime_ns == first
    file.show(view("2 waiting: each needs 1 GPU, 0 of 4 free"))
    read = Live.read(path, ME)
    assert read is not None
    assert (read.waiting, read.running) == ("2 waiting: each needs 1 GPU, 0 of 4 free", ((3, 1),))
    file.show(view(epoch=2))  # too soon
    assert Live.read(path, ME) == read
    clock[0] += module.WRITE_EVERY
    file.show(view(epoch=2))
    read = Live.read(path, ME)
    assert read is not None
    assert read.running == ((3, 2),)
    assert read.lines() == ["running: trial 3 after epoch 2"]
    file.remove()
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_only_the_living_drivers_word_counts(tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    assert Live.read(path, ME) is None
    LiveFile(path).show(view())
    assert Live.read(path, None) is None
    assert Live.read(path, f"pid {os.getpid()}1 on {socket.gethostname()}") is None
    assert Live.read(path, f"{ME}, if it still lives") is not None
    good = json.loads(path.read_text())
    changes: tuple[dict[str, Any], ...] = ({"running": 3}, {"running": [{}]}, {"at": "soon"})
    for broken in changes:
        path.write_text(json.dumps({**good, **broken}))
        assert Live.read(path, ME) is None
    for text in ("", "[]", "{", "[" * 10**5, "\x00"):
        path.write_text(text)
        assert Live.read(path, ME) is None


def test_status_shows_it_while_the_search_is_driven(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    with FileLease(desk.folder.lock, lambda text: None):
        LiveFile(desk.folder.live).show(view("1 waiting: \x1b[2Jeach needs 1 GPU"))
        report = status(tmp_path, "demo")
        assert report.live is not None
        assert report.live.lines()[-1] == "1 waiting: \\x1b[2Jeach needs 1 GPU"
        assert report.to_dict()["live"]["running"] == [{"number": 3, "epoch": 1}]
    assert status(tmp_path, "demo").live is None
    assert status(tmp_path, "demo").to_dict()["live"] is None
    desk.store.close()


class Site:
    """A cluster of one node, as :class:`RaySession` shows it."""

    local = False

    def __init__(self, free: dict[str, float]) -> None:
        self.free = free

    def cluster(self) -> Cluster:
        return Cluster((Node({"CPU": 4, "GPU": 2}, self.free),))


class Mute:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: ""


def pulse_of(desk: Desk, site: Site, gpus: float) -> Pulse:
    mute: Any = Mute()
    ray: Any = site
    return Pulse(desk.book, mute, ray, mute, desk.config, gpus, LiveFile(desk.folder.live))


def reason(pulse: Pulse) -> str:
    pulse._why(0.0)
    return pulse._why(10.0)


def take(book: Book, count: int) -> list[int]:
    turns = [book.next() for _ in range(count)]
    return [turn.number for turn in turns if isinstance(turn, Handout)]


def test_what_starts_is_told_from_what_waits(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config(), concurrency=3)
    assert len(take(desk.book, 2)) == 2
    site = Site({"CPU": 2})
    assert reason(pulse_of(desk, site, 1)) == "2 starting: a worker process loads its libraries"
    desk.book.unplaced = 2
    assert reason(pulse_of(desk, site, 1)) == "2 waiting: each needs 1 GPU, 0 of 2 free"
    desk.book.unplaced = 1
    # Two halves of two GPUs are no whole one.
    site.free["GPU"] = 1.0
    desk.book._part(0)
    assert reason(pulse_of(desk, site, 0.5)) == (
        "1 waiting: each needs 1 CPU, 2 of 4 free and 1 GPU, 1 of 2 free, and Ray has not placed "
        "it yet; one ran out of GPU memory and waits for a whole GPU"
    )
    desk.book.holding |= {0, 1}
    assert reason(pulse_of(desk, site, 0.5)) == ""
    desk.store.close()


def test_a_driver_that_was_replaced_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    path.write_text("the other driver's", encoding="utf-8")

    def lost() -> None:
        raise LeaseLostError("taken over")

    file = LiveFile(path, lost)
    with pytest.raises(LeaseLostError):
        file.show(view())
    file.remove()
    assert path.read_text(encoding="utf-8") == "the other driver's"
