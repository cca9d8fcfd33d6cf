"""What a command expects of the process that it runs in, made good where it is missing."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path


def open_closed_streams() -> None:
    """Let a standard stream that came closed lead nowhere, as with ``>/dev/null``.

    Else the next files that are opened, such as the study's, would get the numbers 0 to 2, which
    libraries and child processes write to.
    """
    while (lowest_free := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(lowest_free, True)
    os.close(lowest_free)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def give_a_home() -> None:
    """Let libraries keep their caches somewhere where the user's home is missing or read-only.

    A read-only home stays the home, for what is read there: credentials, tokens. MLflow cannot even
    be imported without one, as for the nameless user ids of containers.
    """
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path's own raises where there is none
    if home.is_absolute() and os.access(home, os.R_OK | os.W_OK | os.X_OK):
        return
    own = _own_folder()
    if not home.is_absolute() or not os.path.isdir(home):  # noqa: PTH112 - nor may this one raise
        os.environ["HOME"] = str(own)
    os.environ.setdefault("MPLCONFIGDIR", str(own / "matplotlib"))


def _own_folder() -> Path:
    """A folder beside the temporary files that only this user can write: the same one every time,
    unless somebody else has put something in its place."""
    own = Path(tempfile.gettempdir(), f"topotune-{os.getuid()}")
    with contextlib.suppress(OSError):
        own.mkdir(mode=0o700, exist_ok=True)
        found = own.lstat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and not own.is_symlink():
            return own
    return Path(tempfile.mkdtemp(prefix="topotune-"))
