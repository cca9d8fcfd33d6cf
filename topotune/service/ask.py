"""Ask a cluster: run a command of topotune there, beside the stores, and have its output here."""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from topotune import __version__
from topotune.errors import ResourceError, RunError, UserError
from topotune.service.cluster import Cluster, Job

_BEGUN = "Running entrypoint for job"
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


def ask(cluster: Cluster, arguments: Sequence[str], name: str = "all") -> Answer:
    """Run ``topotune`` with these arguments on the cluster, and wait for it.

    Args:
        cluster: where.
        arguments: the command.
        name: the search that it is about, for whoever looks at the cluster's jobs meanwhile.

    Raises:
        ResourceError: the cluster has no room for a job, or no topotune of this version.
        RunError: Ray lost the job.
    """
    mark = secrets.token_hex(12)
    width = shutil.get_terminal_size((200, 24)).columns
    env = {"TOPOTUNE_ANSWER": mark, "TOPOTUNE_WIDTH": str(width)}
    job_id = cluster.submit(arguments, {"verb": "question", "search": name}, env=env)
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
    data = json.loads(line)
    return Answer(data["out"], printed(before), int(data["code"]), base64.b64decode(data["files"]))


def printed(log: str) -> str:
    """A job's log without Ray's lines on how it was started."""
    lines = log.splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith(_BEGUN)]
    return "\n".join(lines[starts[0] + 1 :] if starts else lines).strip()


def failure(job: Job, log: str) -> RunError | ResourceError:
    """Why a job came to nothing, from what it printed."""
    text = printed(log) or job.message
    missing = ("No module named topotune", "not found", "No such option: --on-cluster")
    if job.exit_code in (1, 2, 127) and any(words in text for words in missing):
        last = text.splitlines()[-1]
        return ResourceError(
            f"the cluster has no topotune {__version__} ({last}). Install that version in the "
            "environment that starts Ray on every node; if that is not the 'python' on its path, "
            "set TOPOTUNE_PYTHON there"
        )
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if lines:
        return RemoteError(lines[-1].removeprefix("error: "), job.exit_code or 1)
    return RunError(f"job {job.id} {job.status.lower()}: {text[-2000:] or 'it printed nothing'}")
