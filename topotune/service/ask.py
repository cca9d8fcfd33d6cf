"""Ask a cluster: run a command of topotune there, beside the stores, and have its output here."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from topotune import __version__
from topotune.errors import ResourceError, RunError, UserError
from topotune.search.code.shipped import ship_env
from topotune.service.jobs import Job, JobsApi

_BEGUN = "Running entrypoint for job"
_NONE_THERE = re.compile(
    r"No module named '?[\w.]+'?$|(?:command )?not found$|No such option: --on-cluster"
)
START_SECONDS = 120.0
_ANSWER_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Answer:
    """What a command printed, on which messages, and its files as an archive."""

    out: str
    notes: str
    code: int
    files: bytes


class RemoteError(RunError):
    """What a command said on the cluster, as it would have said it here."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def ask(
    cluster: JobsApi, arguments: Sequence[str], name: str = "all", env_file: Path | None = None
) -> Answer:
    """Run ``topotune`` with these arguments on the cluster, and wait for it.

    Args:
        cluster: where.
        arguments: the command.
        name: the search that it is about, as the cluster's list of jobs shows it.
        env_file: variables that it needs besides the cluster's own.

    Raises:
        ResourceError: the cluster has no room for a job, or no topotune of this version.
        RunError: Ray lost the job.
    """
    mark = secrets.token_hex(12)
    width = shutil.get_terminal_size((200, 24)).columns
    env = {"TOPOTUNE_ANSWER": mark, "TOPOTUNE_WIDTH": str(width)}
    labels = {"verb": "question", "search": name}
    with tempfile.TemporaryDirectory(prefix="topotune-package-") as folder:
        package = None if env_file is None else Path(folder)
        if package is not None and env_file is not None:
            ship_env(env_file, package)
        job_id = cluster.submit(arguments, labels, package, env)
    try:
        job = cluster.wait(job_id, START_SECONDS)
        if job.status == "PENDING":
            raise ResourceError(
                f"{cluster.address}: the job has not started for {START_SECONDS:.0f} s: "
                f"{job.message}. Is the head node overloaded?"
            )
        job = cluster.wait(job_id, _ANSWER_SECONDS)
        log = cluster.logs(job_id)
    finally:
        with contextlib.suppress(UserError, RunError):
            cluster.stop(job_id)
            cluster.wait(job_id, 10)
            cluster.forget(job_id)
    before, found, line = log.rpartition(f"\n{mark}")
    if not found:
        raise failure(job, log)
    try:
        data = json.loads(line.partition("\n")[0])  # what an interpreter's end prints comes after
        files = base64.b64decode(data["files"])
        return Answer(data["out"], printed(before), int(data["code"]), files)
    except (ValueError, KeyError, TypeError):
        raise failure(job, log) from None


def printed(log: str) -> str:
    """A job's log without Ray's lines on how it was started."""
    lines = log.splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith(_BEGUN)]
    return "\n".join(lines[starts[0] + 1 :] if starts else lines).strip()


def final_error(text: str) -> str:
    """The error that a command printed last, all faults of a file being one; empty for none."""
    lines = text.splitlines()
    while lines and not lines[-1].startswith("error: "):
        lines.pop()
    first = len(lines)
    while first and lines[first - 1].startswith("error: "):
        first -= 1
    return "; ".join(line.removeprefix("error: ") for line in lines[first:])


def failure(job: Job, log: str) -> RunError | ResourceError:
    """Why a job came to nothing, from what it printed."""
    text = printed(log) or job.message
    if error := final_error(text):
        return RemoteError(error, job.exit_code or 1)
    last = (text.strip().splitlines() or [""])[-1]
    if job.exit_code in (1, 2, 127) and _NONE_THERE.search(last):
        return ResourceError(
            f"the cluster has no topotune {__version__}, or not all that it needs ({last}). "
            "Install that version in the environment that starts Ray on every node; if its Python "
            "is not the 'python' on Ray's path, start Ray with TOPOTUNE_PYTHON=PATH"
        )
    return RunError(f"job {job.id} {job.status.lower()}: {text[-2000:] or 'it printed nothing'}")
