"""What is waited for is said on a terminal, and to nobody else."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import time
from topotune.cli.options import waiting
with waiting("asking http://[::1]:8265\\x07"):
    time.sleep(0.3)
print("answered")
"""


def run(stderr: int) -> str:
    """Standard output of a program that waits."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "TERM": "xterm"}, stderr=stderr,
        stdout=subprocess.PIPE, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout


def test_a_terminal_says_what_is_waited_for() -> None:
    ours, theirs = os.openpty()
    try:
        assert run(theirs) == "answered\n"
        text = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "asking http://[::1]:8265" in text
    assert "\x07" not in text
    assert text.endswith("\x1b[2K")  # it is gone afterwards


def test_a_pipe_is_told_nothing() -> None:
    ours, theirs = os.pipe()
    assert run(theirs) == "answered\n"
    os.close(theirs)
    with os.fdopen(ours) as stream:
        assert stream.read() == ""
