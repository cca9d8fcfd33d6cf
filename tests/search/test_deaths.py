"""Why a worker died, how often its trial may be tried again, and what ends with its driver."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from pydantic import ValidationError
from ray.tune import PlacementGroupFactory

from tests.search_cases import Desk, make_config, report
from topotune.records import Outcome
from topotune.search.drive.book import Progress, Turn
from topotune.search.drive.recorder import Recorder, recorded
from topotune.search.ray.sweep import MARK, Sweeper, sweep
from topotune.search.ray.tune import StudyScheduler
from topotune.search.ray.watchdog import GUARD_FILE
from topotune.search.ray.worker import _raised_by_ray
from topotune.search.study.deaths import Cause, Death, classify, restarts, take_note, verdict
from topotune.search.study.store import Handout
from topotune.tracking.entries import Epoch, Metrics, begun
from topotune.tracking.outbox import bodies_of
from topotune.train.checkpoint import CheckpointStore
from topotune.train.overhead import Overhead
from topotune.train.record import TrialRecord

WORKER = 'Thread 0x01 (most recent call first):\n  File "/x/search/worker.py", line 1 in step\n'
NOTE = """{head}
Thread 0x00007f1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait

Thread 0x00007f2 (most recent call first):
  File "/env/lib/python3.11/site-packages/torch/nn/functional.py", line 9 in linear
  File "/home/u/my_task.py", line 12 in loss
  File "/x/topotune/search/ray/worker.py", line 88 in _advance
"""


KILLED = (
    "The actor died unexpectedly before finishing this task.\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker "
    "exit detail: Worker unexpectedly exits with a connection error code 2. End of file. Some "
    "common causes include: (1) the process was killed by the OOM killer due to high memory usage, "
    "(2) ray stop --force was called, or (3) the worker crashed due to SIGSEGV. If the "
    "process was killed by the kernel OOM killer (verifiable by checking for OOM in dmesg of the "
    "OOMing node), consider enabling resource isolation to prevent node deaths by contention"
)
UNAVAILABLE = (
    "The actor 87cef7a01a is unavailable: The actor is temporarily unavailable: RpcError: RPC "
    "error: Socket closed rpc_code: 14. The task may or may not have been executed on the actor."
)
TASK_ERROR = "\x1b[36mray::ResourceTrainable.train()\x1b[39m (pid=1)\n  File x\nValueError: no"

FULL = (
    "\x1b[36mray::ResourceTrainable.train()\x1b[39m (pid=1)\n  File x\n"
    "    raise GpuMemoryError(where + words + self._traceback()) from None\n"
    "topotune.errors.GpuMemoryError: its tensors took 71.2 GiB (traceback: error.txt)"
)


@pytest.mark.parametrize(
    ("error", "note", "cause", "words"),
    [
        (KILLED, "", Cause.CRASH, "killed from outside"),
        ("The actor died because its node has died. Node Id: 1", "", Cause.NODE, "connection"),
        (UNAVAILABLE, "", Cause.NODE, "connection"),
        (
            "Task was killed due to the node running low on memory",
            "",
            Cause.OUT_OF_MEMORY,
            "nearly full",
        ),
        (TASK_ERROR, "", Cause.ERROR, "ValueError: no"),
        (FULL, "", Cause.GPU_MEMORY, "its tensors took 71.2 GiB (traceback: error.txt)"),
        (KILLED, "Frozen\n", Cause.STALL, "frozen"),
        (KILLED, NOTE.format(head="Timeout (0:00:05)!"), Cause.STALL, "my_task.py:12 loss"),
        (
            KILLED,
            NOTE.format(head="Memory: 2.00 GiB resident, limit 1.00 GiB"),
            Cause.MEMORY,
            "2.00 GiB resident, limit 1.00 GiB in my_task.py:12 loss",
        ),
        (
            KILLED,
            NOTE.format(head="Fatal Python error: Aborted"),
            Cause.CRASH,
            "SIGABRT in my_task.py:12 loss",
        ),
        (
            KILLED,
            "Fatal Python error: Segmentation fault\n\n" + WORKER,
            Cause.CRASH,
            "SIGSEGV in worker.py:1 step",
        ),
        ("", "torn\nrubbish \x00", Cause.CRASH, "killed from outside"),
    ],
)
def test_causes_are_told_apart(error: str, note: str, cause: Cause, words: str) -> None:
    death = classify(error, note)
    assert death.cause is cause
    assert words in death.text


def test_a_note_is_read_once_and_kept_as_evidence(tmp_path: Path) -> None:
    assert take_note(tmp_path) == ""
    for _ in range(2):
        (tmp_path / GUARD_FILE).write_text("Fatal Python error: Aborted\n")
        assert take_note(tmp_path).startswith("Fatal")
    (tmp_path / GUARD_FILE).touch()  # of a worker that was killed
    assert take_note(tmp_path) == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["crash-1.txt", "crash-2.txt"]


def test_each_cause_has_its_own_budget() -> None:
    budget = make_config(
        budget={"trials": 1, "max_failures": 1, "max_node_failures": 9, "max_out_of_memory": 3}
    ).budget
    allowed = {cause: restarts(budget, cause) for cause in Cause}
    assert allowed == {
        Cause.CRASH: 1,
        Cause.NODE: 9,
        Cause.OUT_OF_MEMORY: 3,
        Cause.GPU_MEMORY: 1,
        Cause.STALL: 0,
        Cause.MEMORY: 0,
        Cause.ERROR: 0,
    }
    assert verdict(Death(Cause.CRASH, "SIGABRT"), 3) == "its worker died 3 times (last: SIGABRT)"


def test_deaths_are_counted_over_sessions_each_cause_for_itself(tmp_path: Path) -> None:
    config = make_config(budget={"trials": 1, "epochs": 3, "max_failures": 1})
    crash, node = Death(Cause.CRASH, "SIGSEGV"), Death(Cause.NODE, "gone")

    def take_up() -> Desk:
        desk = Desk(tmp_path, config)
        handout = desk.book.next()
        assert isinstance(handout, Handout)
        assert handout.number == 0
        return desk

    first = take_up()
    assert "0 more restarts allowed" in first.book.died(0, crash)
    for left in (19, 18):
        assert f"{left} more restarts allowed" in first.book.died(0, node)
    assert not first.book.over(0)

    second = take_up()  # the first driver was killed
    assert "given up: its worker died 2 times (last: SIGSEGV)" in second.book.died(0, crash)
    assert second.book.over(0)
    row = second.book.end(0)
    assert row is not None
    assert (row.state, row.reason) == ("FAILED", "its worker died 2 times (last: SIGSEGV)")


@pytest.mark.parametrize(
    ("epochs", "state", "reason"),
    [
        (2, "FAILED", "its worker died: killed from outside, or by the system for its memory"),
        (3, "COMPLETE", ""),
    ],
    ids=["before its last epoch", "after it"],
)
def test_epochs_that_a_dead_worker_recorded_and_could_not_tell_count(
    tmp_path: Path, epochs: int, state: str, reason: str
) -> None:
    config = make_config(budget={"trials": 1, "epochs": 3, "max_failures": 0}, pruner="none")
    desk = Desk(tmp_path, config)
    handout = desk.book.next()
    assert isinstance(handout, Handout)
    reports = [report(handout.spec, epoch) for epoch in range(1, epochs + 1)]
    start, overhead = begun({}, {}, 1), Overhead({"overhead_vs_adam": 1.25}, 1)
    for count in range(1, epochs + 1):
        record = TrialRecord(start, overhead, tuple(reports[:count]))
        desk.folder.trial(0).mkdir(parents=True, exist_ok=True)
        CheckpointStore(desk.folder.trial(0), handout.spec).save({}, record.to_dict())
    recorder = Recorder(desk.folder, config)
    desk.book.record = recorder.progress
    assert desk.book.progress(0, Progress((reports[0],)))
    left = recorded(desk.folder.trial(0), handout.spec)
    told = (start, Metrics({"overhead_vs_adam": 1.25}, 0, 1))
    assert left == Progress(tuple(reports), {"overhead_vs_adam": 1.25}, entries=told)
    scheduler = StudyScheduler(
        desk.book,
        desk.folder.trial,
        lambda number: recorded(desk.folder.trial(number), handout.spec),
        lambda text: None,
        lambda config: PlacementGroupFactory([{"CPU": 1.0}]),
    )
    dead: Any = SimpleNamespace(config={"number": 0, "alone": False}, error_file=None)
    scheduler.on_trial_error(None, dead)
    bodies = bodies_of(desk.folder.root, 0)
    assert [body.report for body in bodies if isinstance(body, Epoch)] == reports
    row = desk.book.end(0)
    assert row is not None
    assert (row.state, row.reason, row.epochs) == (state, reason, epochs)
    assert row.metrics["val_accuracy"] == reports[-1].metrics["val_accuracy"]
    assert recorded(desk.folder.trial(7), handout.spec) == Progress()


def test_a_hang_is_never_retried_and_a_death_while_stopping_is_not_counted(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config(budget={"trials": 2, "epochs": 3}), concurrency=2)
    handouts = [desk.book.next(), desk.book.next()]
    assert all(isinstance(handout, Handout) for handout in handouts)
    desk.book.died(0, Death(Cause.STALL, "no progress"))
    row = desk.book.end(0)
    assert row is not None
    assert (row.state, row.reason) == ("FAILED", "no progress")
    desk.book.stop("stopped by SIGINT")
    assert "a resume goes on" in desk.book.died(1, Death(Cause.CRASH, "killed"))
    assert desk.book.over(1)
    assert desk.book.end(1) is None
    again = Desk(tmp_path, make_config(budget={"trials": 2, "epochs": 3}))
    handout = again.book.next()
    assert isinstance(handout, Handout)
    again.book.progress(1, Progress((report(handout.spec, 1),), outcome=Outcome.PRUNED))
    assert "1 more restart " in again.book.died(1, Death(Cause.CRASH, "killed"))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"memory": "4"}, "such as 4GB"),
        ({"memory": "4 parsecs"}, "such as 4GB"),
        ({"memory": 5}, "greater than or equal to 1048576"),
        ({"stall": 0}, "greater than"),
        ({"stall": "soon"}, "such as 20m"),
        ({"stal": 5}, "Extra inputs"),
    ],
)
def test_bad_limits_are_refused(limits: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        make_config(limits=limits)


def test_limits_have_units_and_can_be_off() -> None:
    limits = make_config(limits={"stall": "10m", "memory": "1.5GiB"}).limits
    assert (limits.stall, limits.memory) == (600.0, 1.5 * 2**30)
    limits = make_config(limits={"stall": None, "memory": None}).limits
    assert (limits.stall, limits.memory) == (None, None)
    assert make_config().limits.memory == "auto"


def test_the_sweep_ends_marked_processes_and_no_others() -> None:
    other = subprocess.Popen(["sleep", "300"])
    code = (
        "import subprocess, time\nfrom topotune.search.ray.sweep import Sweeper\n"
        "with Sweeper():\n"
        "    a = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
        "    a.send_signal(19)\n"
        "    print(a.pid, flush=True)\n"
        "    time.sleep(300)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        child = int(driver.stdout.readline())
        driver.kill()
        driver.wait()
        deadline = time.monotonic() + 30
        while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        driver.stdout.close() if driver.stdout else None


def test_a_session_that_ends_well_sweeps_too_and_restores_the_environment() -> None:
    with Sweeper():
        mark = os.environ[MARK]
        child = subprocess.Popen(["sleep", "300"])
    assert child.wait(30) == -signal.SIGKILL
    assert MARK not in os.environ
    assert sweep(mark) == 0


def test_what_ran_out_of_gpu_memory_is_tried_again_alone_and_once(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config(budget={"trials": 3, "epochs": 4}), concurrency=3)
    desk.ledger._devices = 0.5
    hungry, other = desk.book.next(), desk.book.next()
    assert isinstance(hungry, Handout)
    assert isinstance(other, Handout)
    desk.book.holding |= {hungry.number, other.number}
    assert [hungry.alone, other.alone] == [False, False]
    line = desk.book.died(hungry.number, Death(Cause.GPU_MEMORY, "took 9 of 10 GiB"))
    assert line == (
        "trial 0: its GPU ran out of memory: took 9 of 10 GiB; it goes on from its last epoch, "
        "alone on a device (0 more restarts allowed)"
    )
    assert not desk.book.over(hungry.number)
    # Until it has its own, the others must not take what becomes free.
    desk.book.holding.discard(hungry.number)
    assert desk.book.next() is Turn.WAIT
    desk.book.holding.add(hungry.number)
    assert isinstance(desk.book.next(), Handout)
    # It is charged for all of the device that it holds.
    before = dict(desk.ledger.trials)
    desk.ledger._last -= 10
    desk.ledger.tick([hungry.number, other.number])
    spent = [desk.ledger.trials[n] - before.get(n, 0.0) for n in (hungry.number, other.number)]
    assert spent[0] == pytest.approx(2 * spent[1])
    desk.store.close()

    # A later session knows, hands it out alone, and goes on counting.
    again = Desk(tmp_path, desk.config, concurrency=3)
    handout = again.book.next()
    assert isinstance(handout, Handout)
    assert (handout.number, handout.alone) == (hungry.number, True)
    assert again.book.waits_alone
    line = again.book.died(handout.number, Death(Cause.GPU_MEMORY, "alone, took 10 of 10 GiB"))
    assert "is given up" in line
    row = again.book.end(handout.number)
    assert row is not None
    assert row.state == Outcome.FAILED
    assert row.reason == "its GPU ran out of memory 2 times (last: alone, took 10 of 10 GiB)"
    again.store.close()


def test_what_ray_raises_at_sigterm_is_no_fault_of_the_trial() -> None:
    # The very function that Ray's handler in a worker calls.
    from ray._raylet import raise_sys_exit_with_custom_error_message  # type: ignore[attr-defined]

    with pytest.raises(SystemExit) as by_ray:
        raise_sys_exit_with_custom_error_message("terminated")
    assert _raised_by_ray(by_ray.value)
    with pytest.raises(SystemExit) as by_the_user:
        sys.exit(1)
    assert not _raised_by_ray(by_the_user.value)
