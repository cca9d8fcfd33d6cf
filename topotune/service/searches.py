"""Searches on a cluster by name: submit, resume, extend, stop, and the jobs that drive them."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from topotune.config.file import read_yaml
from topotune.config.models import SearchConfig
from topotune.errors import ResourceError, RunError, SearchFolderError
from topotune.search.code.shipped import REPOSITORY_FILE, SEARCH_FILE, from_archive, ship_env
from topotune.search.place.addresses import EXPERIMENT
from topotune.search.view import BEGUN
from topotune.service.ask import Answer, RemoteError, ask, failure, final_error
from topotune.service.jobs import DRAIN_SECONDS, Job, JobsApi
from topotune.service.ship import pack

BEGIN_SECONDS = 180.0
"""How long a command waits for the driver to have checked its search and begun."""
_LOOK_SECONDS = 0.5


def submit(
    cluster: JobsApi,
    config: SearchConfig,
    text: str,
    data: object,
    options: Sequence[str],
    include: Sequence[Path] = (),
    env_file: Path | None = None,
) -> str:
    """Ship a new search and start its driver; the job's id.

    Args:
        cluster: where.
        config: the search.
        text, data: its file, as text and as plain data.
        options: of ``topotune search`` on the cluster.
        include, env_file: as :func:`topotune.service.ship.pack`.

    Raises:
        ConfigError: something cannot be packed.
        SearchFolderError: a search of that name is being driven.
    """
    _refuse_driven(cluster, config.name)
    with tempfile.TemporaryDirectory(prefix="topotune-package-") as folder:
        pack(Path(folder), text, data, Path.cwd(), include, env_file)
        arguments = ["search", SEARCH_FILE, "--name", config.name, "--ray-address", "auto"]
        labels = {"search": config.name, "verb": "search"}
        named = os.environ.get(EXPERIMENT)
        env = {EXPERIMENT: named} if named else None
        return cluster.submit([*arguments, *options], labels, Path(folder), env)


def again(
    cluster: JobsApi,
    name: str,
    trials: int,
    env_file: Path | None = None,
    as_json: bool = False,
    code: Path | None = None,
) -> tuple[str, str]:
    """Start a driver for a search that exists, with the code that it was submitted with.

    Args:
        cluster: where.
        name: the search.
        trials: how many more than it had; 0 only resumes.
        env_file: variables of the driver and its workers.
        as_json: show a finished search as JSON.
        code: a folder whose modules take the place of those that it was submitted with.

    Returns:
        The job's id, and nothing; or nothing, and the results of a search that has nothing left to
        resume, for which no driver is started.

    Raises:
        ConfigError: a module cannot be packed.
        SearchFolderError: it is being driven.
        RemoteError: the cluster's storage has no such search.
    """
    _refuse_driven(cluster, name)
    question = ["package", name]
    if not trials:
        question += ["--unfinished", *(["--json"] if as_json else [])]
    answer = ask(cluster, question, name, env_file)
    if answer.code:
        raise refusal(answer)
    if answer.out:
        return "", answer.out
    verb = "extend" if trials else "resume"
    more = ["--trials", str(trials)] if trials else []
    with tempfile.TemporaryDirectory(prefix="topotune-package-") as folder:
        place = Path(folder)
        if answer.files:
            from_archive(answer.files, place)
        (place / SEARCH_FILE).touch()  # a package must not be empty
        if code is not None:
            if (place / REPOSITORY_FILE).exists():
                (place / REPOSITORY_FILE).write_text("null", encoding="utf-8")  # of the old code
            text = (place / SEARCH_FILE).read_text(encoding="utf-8")
            pack(place, text, read_yaml(place / SEARCH_FILE)[0], code)
            more += ["--changed-code"]
        if env_file is not None:
            ship_env(env_file, place)
        arguments = [verb, name, *more, "--ray-address", "auto"]
        return cluster.submit(arguments, {"search": name, "verb": verb}, place), ""


def refusal(answer: Answer) -> RemoteError:
    """The error that a question ended with."""
    return RemoteError(final_error(answer.notes) or answer.notes[-1000:], answer.code)


def await_begin(cluster: JobsApi, job_id: str, name: str) -> None:
    """Wait until the driver of a search has checked it and begun.

    Raises:
        RemoteError: it has found something wrong, or another failure.
        ResourceError: the cluster has no topotune of this version, or the driver is slow to begin.
    """
    end = time.monotonic() + BEGIN_SECONDS
    while True:
        job = cluster.job(job_id)
        log = cluster.logs(job_id) if job.status != "PENDING" else ""
        if BEGUN in log or job.status == "SUCCEEDED":
            return
        if job.over:
            raise failure(job, log)
        if time.monotonic() > end:
            raise ResourceError(
                f"search {name!r}: its driver has been checking it for {BEGIN_SECONDS:.0f} s and "
                f"goes on; 'topotune logs {name} -f' follows it"
            )
        time.sleep(_LOOK_SECONDS)


def stop(cluster: JobsApi, name: str | None, note: Callable[[str], None]) -> list[Job]:
    """Drain a search, or all that run: trials finish their epoch, all is saved, the job ends.

    All are asked first and waited for then, so that they drain at the same time.

    Raises:
        SearchFolderError: no job drives it.
        RunError: a job has not ended in time.
    """
    known = [job for job in cluster.jobs() if name in (None, job.search)]  # the newest first
    jobs = [job for job in known if not job.over]
    if name and not jobs:
        how = f"its last job is {known[0].status}" if known else "no job of that name is known"
        raise SearchFolderError(
            f"search {name!r}: nobody drives it on {cluster.address} ({how}). 'topotune list' "
            "shows what runs there"
        )
    for job in jobs:
        note(f"{job.search}: asked to stop; trials finish their epoch and are saved")
        cluster.stop(job.id)
    ended = [cluster.wait(job.id, DRAIN_SECONDS + 15.0) for job in jobs]
    for job in ended:
        if not job.over:
            raise RunError(
                f"search {job.search!r}: job {job.id} has not ended within {DRAIN_SECONDS + 15} s; "
                "Ray kills it by itself. What is recorded is kept"
            )
    return ended


def has_begun(cluster: JobsApi, job: Job) -> bool:
    """Whether a driver had checked its search, so that this is on disk."""
    return BEGUN in cluster.logs(job.id)


def logs(cluster: JobsApi, name: str, follow: bool, show: Callable[[str], None]) -> None:
    """Show what the newest driver of a search has printed, and go on until it ends.

    Raises:
        SearchFolderError: no job of that name is known.
    """
    job = next((job for job in cluster.jobs() if job.search == name), None)
    if job is None:
        raise SearchFolderError(
            f"search {name!r}: no job of that name is known to {cluster.address} (Ray forgets its "
            "jobs when the head restarts). 'topotune status' reads the search itself"
        )
    if follow and not job.over:
        with contextlib.suppress(KeyboardInterrupt):  # ends the watching, not the search
            cluster.follow(job.id, show)
    else:
        show(cluster.logs(job.id))


def _refuse_driven(cluster: JobsApi, name: str) -> None:
    for job in (job for job in cluster.jobs() if job.search == name and not job.over):
        raise SearchFolderError(
            f"search {name!r}: is being driven on {cluster.address} by job {job.id} of "
            f"{job.user}. Wait for it or 'topotune stop {name}'; a new search needs another --name"
        )
