"""The watchdog of a worker, inside and outside of its process: what hangs and what grows ends."""

from __future__ import annotations

import faulthandler
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pytest
from ray.tune.experiment import Trial

from topotune.search.ray import watchdog
from topotune.search.ray.watchdog import (
    GUARD_FILE,
    HANG_FILE,
    Guard,
    Stalls,
    machine_memory,
    resident,
)
from topotune.search.study.deaths import Cause, classify, take_note

KILLED = "The actor is dead because its worker process has died."


def worker(body: str, stall: str, memory: str = "None") -> str:
    """Lines of Python that run under a guard in a process of their own."""
    code = "import os, signal, subprocess, sys, threading, time\n"
    code += "from pathlib import Path\nfrom topotune.search.ray.watchdog import Guard\n"
    code += f"guard = Guard(Path(sys.argv[1]), {stall}, {memory})\n"
    return code + textwrap.dedent(body)


def guarded(tmp_path: Path, body: str, stall: str = "None", memory: str = "None") -> str:
    """Run them; what the guard's file holds then, empty where it is gone."""
    code = worker(body, stall, memory)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)
    file = tmp_path / GUARD_FILE
    return file.read_text() if file.exists() else ""


def test_a_hang_is_ended_with_its_traceback(tmp_path: Path) -> None:
    note = guarded(tmp_path, "with guard.watching():\n    time.sleep(50)\n", stall="1.0")
    death = classify(KILLED, note)
    assert death.cause is Cause.STALL
    assert "hung in <string>:6" in death.text


class Still:
    """A trial of Tune's, for :class:`Stalls`; it has no actor that could be killed."""

    temporary_state = SimpleNamespace(ray_actor=None)


def watch(folder: Path, seconds: float) -> None:
    """What the driver does to a worker's folder that shows no sign of life for a while."""
    stalls = Stalls(1.0, lambda number: folder)
    stalls._patience = 0.0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not any(
        path.stat().st_size for path in folder.glob(GUARD_FILE)
    ):
        stalls.look(cast("dict[int, Trial]", {0: Still()}))
        time.sleep(0.02)


def test_a_hang_that_holds_the_lock_is_ended_by_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "DRIVER_LOOKS_EVERY", 0.05)
    body = """
    import ctypes
    with guard.watching():
        ctypes.PyDLL(None).sleep(4)
        os._exit(0)
    """
    assert guarded(tmp_path, body, stall="1.0") == ""
    watch(tmp_path, 1.0)
    death = classify(KILLED, take_note(tmp_path))
    assert death.cause is Cause.STALL
    assert "hung in <string>:8" in death.text


def test_a_worker_whose_sign_of_life_is_not_to_be_seen_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "DRIVER_LOOKS_EVERY", 0.05)
    watch(tmp_path, 1.0)
    assert not list(tmp_path.iterdir())  # nothing was said of it
    (tmp_path / GUARD_FILE).touch()
    watch(tmp_path, 1.0)
    assert "frozen" in classify(KILLED, take_note(tmp_path)).text


def test_a_worker_suspended_with_its_machine_goes_on(tmp_path: Path) -> None:
    body = """
    with guard.watching():
        for step in range(6):
            Path(sys.argv[1], f"step-{step}").touch()
            for _ in range(10):
                time.sleep(0.1)
            guard.beat()
    guard.close()
    Path(sys.argv[1], "done").touch()
    """
    with subprocess.Popen([sys.executable, "-c", worker(body, "2.5"), str(tmp_path)]) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "step-2").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)  # neither right after a beat nor right before one
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 0
    assert (tmp_path / "done").exists()
    assert not (tmp_path / GUARD_FILE).exists()
    assert not (tmp_path / HANG_FILE).exists()


def test_a_guard_that_is_closed_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither writes to the next trial's files nor ends its process."""
    measuring, seen = threading.Event(), []

    def slow(shared: bool) -> float:
        measuring.set()
        time.sleep(0.5)
        seen.append(shared)
        return 9e9

    monkeypatch.setattr("topotune.search.ray.watchdog.resident", slow)
    monkeypatch.setattr("topotune.search.ray.watchdog.LOOK_EVERY", 0.01)
    guard = Guard(tmp_path, None, 1e9)
    with guard.watching():
        assert measuring.wait(30)
    guard.close()
    faulthandler.enable()  # pytest's own
    assert seen == [True, False]  # it came to its end before the descriptors were closed
    assert list(tmp_path.iterdir()) == []  # a trial that ended well leaves no file of its guard


def test_progress_and_idleness_are_no_stall(tmp_path: Path) -> None:
    body = """
    for turn in range(2):
        with guard.watching():
            for step in range(30):
                time.sleep(0.05)
                guard.beat()
        time.sleep(1.5)
    guard.close()
    Path(sys.argv[1], "done").touch()
    """
    assert guarded(tmp_path, body, stall="1.0") == ""
    assert (tmp_path / "done").exists()


def test_memory_of_children_counts_and_shared_pages_count_once(tmp_path: Path) -> None:
    body = """
    kept = bytearray(os.urandom(1)) * 150_000_000
    with guard.watching():
        if os.fork() == 0:
            time.sleep(4)
            os._exit(0)
        time.sleep(3)
        Path(sys.argv[1], "shared-is-fine").touch()
        more = bytearray(os.urandom(1)) * 200_000_000
        time.sleep(30)
    """
    note = guarded(tmp_path, body, memory="280e6")
    assert (tmp_path / "shared-is-fine").exists()
    assert classify(KILLED, note).cause is Cause.MEMORY


def test_what_a_trial_leaves_running_ends_with_it(tmp_path: Path) -> None:
    body = """
    subprocess.Popen(["sleep", "300"])
    detach = "import subprocess; subprocess.Popen(['sleep', '300'], start_new_session=True)"
    subprocess.run([sys.executable, "-c", detach])
    import psutil
    deadline = time.monotonic() + 20
    while len(psutil.Process().children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [str(p.pid) for p in psutil.Process().children()]
    Path(sys.argv[1], "pids").write_text(" ".join(pids))
    guard.close()
    """
    guarded(tmp_path, body)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2  # the detached one too: its parent has ended
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_guard_without_a_folder_guards_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    guard = Guard(tmp_path / "file" / "below", 60.0, "auto")
    with guard.watching():
        guard.beat()
    guard.close()
    faulthandler.enable()  # pytest's own
    assert machine_memory() >= resident(shared=True) > 1e6
