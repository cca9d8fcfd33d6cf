"""Signals while Ray starts and while a search stops: the process is left in time, with 130."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

_HEAD = """
import time
from topotune.search.drive import signals
from topotune.search.drive.signals import Interrupts, shielded
signals.START_SECONDS = signals.STOP_SECONDS = {limit}
class Book:
    def stop(self, reason):
        print(reason, flush=True)
def busy(seconds):  # as a library that lets no handler run, or swallows what it raises
    end, said = time.monotonic() + seconds, []
    while True:
        try:
            said or print("ready", flush=True)
            said.append(True)
            while time.monotonic() < end:
                time.sleep(0.05)
            return
        except KeyboardInterrupt:
            pass
"""
_START = "with Interrupts() as i, shielded(), i.held():\n    busy({0})"
_STOP = "with Interrupts() as i:\n    i.drain(Book())\n    busy({0})"
_BEFORE = "with Interrupts() as i:\n    busy({0})"


def run(body: str, limit: float, busy: float, *numbers: signal.Signals) -> tuple[int, str, float]:
    """Exit code, what was printed, and seconds since the first signal."""
    code = _HEAD.format(limit=limit) + body.format(busy) + "\nprint('over')"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.5)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output + errors, time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("body", [_START, _STOP, _BEFORE], ids=["start", "stop", "before"])
def test_what_does_not_end_is_left(body: str, number: signal.Signals) -> None:
    code, output, seconds = run(body, 1.0, 50.0, number)
    assert code == 130
    assert output.endswith("aborted\n")
    assert "over" not in output
    assert 1.0 <= seconds < 30


def test_an_abort_says_what_is_kept() -> None:
    body = "with Interrupts() as i:\n    i.kept = 'all of it'\n    i.drain(Book())\n    busy({0})"
    code, output, _ = run(body, 1.0, 50.0, signal.SIGTERM)
    assert code == 130
    assert output.endswith("aborted: all of it\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("body", [_START, _STOP], ids=["start", "stop"])
def test_the_second_signal_leaves_it_soon(body: str, number: signal.Signals) -> None:
    code, output, seconds = run(body, 50.0, 45.0, number, number)
    assert code == 130
    assert output.endswith("aborted\n")
    assert seconds < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_start_that_ends_in_time_ends_by_the_signal_it_met(number: signal.Signals) -> None:
    code, output, _ = run(_START, 50.0, 2.0, number)
    assert code == -signal.SIGINT  # as Python ends by a KeyboardInterrupt that nobody catches
    assert output.strip().endswith(f"KeyboardInterrupt: {number.name}")


def test_a_stop_that_ends_in_time_ends_by_itself() -> None:
    code, output, _ = run(_STOP, 50.0, 2.0, signal.SIGTERM)
    assert (code, output) == (0, "stopped by SIGTERM\nover\n")


def test_an_ignored_hangup_stays_ignored() -> None:
    ignore = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    code, output, _ = run(ignore + _START, 1.0, 3.0, signal.SIGHUP)
    assert (code, output) == (0, "over\n")
