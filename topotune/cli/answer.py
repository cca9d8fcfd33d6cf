"""A command run as a job on a cluster, whose output another machine waits for.

What it prints on standard output is held back and ends up, with its exit code and the files that it
made, as one marked line of the job's log; messages and warnings stay lines of their own before it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from topotune.errors import RunError
from topotune.search.code.shipped import load_env, size_of, to_archive

MARK = "TOPOTUNE_ANSWER"
"""Variable with the word that marks the line; set by who asks."""
WIDTH = "TOPOTUNE_WIDTH"
MAX_BYTES = 200 * 2**20
_brought: list[Path] = []


def asked() -> bool:
    """Whether this process is such a job."""
    return MARK in os.environ


def bring(folder: Path) -> None:
    """Send a folder's content along with the answer, if anybody waits for one.

    Raises:
        RunError: it is too large for that.
    """
    if not asked():
        return
    size = size_of(folder)
    if size > MAX_BYTES:
        raise RunError(
            f"{folder}: {size / 2**20:.0f} MiB are too much to be sent through the cluster's Jobs "
            f"API ({MAX_BYTES >> 20} at most). Ask for fewer trials, or run the command where "
            "the storage is mounted"
        )
    _brought.append(folder)


def answered(command: Callable[[], None]) -> int:
    """Run a command in an empty folder and print its answer; its exit code."""
    mark, kept, code = os.environ[MARK], io.StringIO(), 0
    load_env(Path.cwd())  # the package's, which is left here
    with (
        tempfile.TemporaryDirectory(prefix="topotune-job-") as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(kept),
    ):
        try:
            command()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        archive = b"" if code or not _brought else to_archive(_brought[-1].absolute())
    files = base64.b64encode(archive).decode()
    answer = json.dumps({"out": kept.getvalue(), "code": code, "files": files})
    sys.stderr.flush()
    sys.stdout.write(f"\n{mark}{answer}\n")
    sys.stdout.flush()
    return code
