"""Why a worker died, and whether its trial may be tried again."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from topotune.config.budget import Budget
from topotune.errors import GpuMemoryError
from topotune.redaction import brief
from topotune.search.ray.watchdog import FROZEN_NOTE, GUARD_FILE, MEMORY_PREFIX, STALL_PREFIX


class Cause(StrEnum):
    """What a worker died of; each that is retried has a budget of its own."""

    CRASH = "crash"
    NODE = "node"
    OUT_OF_MEMORY = "out_of_memory"
    GPU_MEMORY = "gpu_memory"
    STALL = "stall"
    MEMORY = "memory"
    ERROR = "error"


@dataclass(frozen=True)
class Death:
    """The end of a worker: its cause, and in words."""

    cause: Cause
    text: str


_DONE = {
    Cause.CRASH: "its worker died",
    Cause.NODE: "its node was lost",
    Cause.OUT_OF_MEMORY: "its node ran out of memory",
    Cause.GPU_MEMORY: "its GPU ran out of memory",
}
_SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Floating": "SIGFPE",
    "Bus error": "SIGBUS",
    "Illegal instruction": "SIGILL",
}
_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>.*)$', re.M)
_NOT_THE_USERS = re.compile(r"/(site-packages|lib/python3[^/]*)/")


RETRIED = tuple(_DONE)
"""Causes that are no verdict on the trial: it is tried again within its budget."""


_GPU_MEMORY = re.compile(rf"{GpuMemoryError.__name__}: (.*)")
"""Raised by our own worker, as Ray shows it."""
GPU_MEMORY_RETRIES = 1
"""The second time it was alone on the device: a third one would be no different."""


# As Ray 2.60 words them. Its words on any death mention "the OOM killer" as a possible cause.
_RAY_SAYS = (
    (
        re.compile(r"memory pressure|running low on memory|OutOfMemoryError"),
        Death(Cause.OUT_OF_MEMORY, "Ray ended it because its node was nearly full"),
    ),
    (
        re.compile(r"node has died|is unavailable: .*RPC error|preempted|NodeDiedError"),
        Death(Cause.NODE, "the connection to it broke"),
    ),
)


def restarts(budget: Budget, cause: Cause) -> int:
    """How often a trial may be restarted after deaths of this cause."""
    return {
        Cause.CRASH: budget.max_failures,
        Cause.NODE: budget.max_node_failures,
        Cause.OUT_OF_MEMORY: budget.max_out_of_memory,
        Cause.GPU_MEMORY: GPU_MEMORY_RETRIES,
    }.get(cause, 0)


def verdict(death: Death, times: int) -> str:
    """The reason of a trial that ends because of this, the last of ``times`` such deaths."""
    done = _DONE.get(death.cause)
    if done is None:
        return death.text
    return f"{done} {times} times (last: {death.text})" if times > 1 else f"{done}: {death.text}"


def take_note(folder: Path) -> str:
    """What a dead worker's guard wrote; the file is put aside, so that it is read once."""
    path = folder / GUARD_FILE
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    with contextlib.suppress(OSError):
        if text:
            path.rename(folder / f"crash-{len(list(folder.glob('crash-*.txt'))) + 1}.txt")
        else:
            path.unlink()
    return text


def classify(error: str, note: str) -> Death:
    """The cause of a worker's death.

    Args:
        error: Ray's words.
        note: what its guard left in its file.
    """
    if note.startswith(STALL_PREFIX):
        return Death(Cause.STALL, f"no progress for longer than limits.stall, hung{_where(note)}")
    if note == FROZEN_NOTE:
        return Death(Cause.STALL, "no progress for longer than limits.stall, its process frozen")
    if note.startswith(MEMORY_PREFIX):
        taken = note.partition("\n")[0].removeprefix(MEMORY_PREFIX)
        return Death(Cause.MEMORY, f"too much memory (limits.memory): {taken}{_where(note)}")
    if note.startswith("Fatal Python error: "):
        words = note.partition("\n")[0].removeprefix("Fatal Python error: ")
        name = next((n for start, n in _SIGNALS.items() if words.startswith(start)), words)
        return Death(Cause.CRASH, name + _where(note))
    if said := _GPU_MEMORY.findall(error):
        return Death(Cause.GPU_MEMORY, said[-1])
    for pattern, death in _RAY_SAYS:
        if pattern.search(error):
            return death
    if "ray::" in error and "Traceback" not in error.partition("ray::")[0]:
        last = error.strip().splitlines()[-1]
        return Death(Cause.ERROR, f"its worker failed: {brief(last, 300)}")
    return Death(Cause.CRASH, "killed from outside, or by the system for its memory")


def _where(note: str) -> str:
    """The innermost line of Python that is not a library's, in the thread that trained."""
    threads = re.split(r"^(?=(?:Current thread|Thread) 0x)", note, flags=re.M)
    working = [t for t in threads if "search/ray/worker.py" in t] or threads[-1:]
    frames = list(_FRAME.finditer(working[0]))
    own = [frame for frame in frames if not _NOT_THE_USERS.search(frame["file"])]
    if not (own or frames):
        return ""
    frame = (own or frames)[0]
    return f" in {Path(frame['file']).name}:{frame['line']} {frame['name']}"
