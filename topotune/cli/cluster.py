"""``submit``, ``list``, ``logs`` and ``stop``: searches on a cluster, by name."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topotune import __version__
from topotune.cli import answer
from topotune.cli.options import (
    DEFAULT_RESULTS,
    Address,
    AllowOpen,
    AsJson,
    EnvFile,
    ResultsDir,
    SearchFile,
    SearchName,
    complete_name,
    console,
    elsewhere,
    plain_table,
    print_json,
    say,
    shown,
    waiting,
    with_options,
)
from topotune.errors import ConfigError, InterruptError
from topotune.settings import ADDRESS, STORAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from topotune.service.ask import Answer
    from topotune.service.jobs import JobsApi

Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait until its driver has checked it and begun.")
]


def submit(
    context: typer.Context,
    file: SearchFile,
    address: Address = None,
    name: Annotated[str | None, typer.Option(help="Another name than the file's.")] = None,
    trials: Annotated[int | None, typer.Option(help="Another number of trials.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Another number of epochs.")] = None,
    priority: Annotated[int | None, typer.Option(help="Its weight among other searches.")] = None,
    env_file: EnvFile = None,
    include: Annotated[
        list[Path] | None, typer.Option(help="A file or folder to ship, too; may be repeated.")
    ] = None,
    wait: Wait = True,
    allow_open: AllowOpen = False,
    as_json: AsJson = False,
) -> None:
    """Run a new search on a cluster. Once it has begun, it needs this machine no longer."""
    from topotune.config.file import parse_search, read_yaml
    from topotune.config.rules import remarks

    data, lines = read_yaml(file)
    changes = {
        ("name",): name,
        ("budget", "trials"): trials,
        ("budget", "epochs"): epochs,
        ("resources", "priority"): priority,
    }
    config = parse_search(with_options(data, changes), str(file), lines)
    for remark in remarks(config):
        say(f"note: {remark}", err=True)
    options: list[str] = []
    for option, value in (
        ("--trials", trials),
        ("--epochs", epochs),
        ("--priority", priority),
    ):
        options += [] if value is None else [option, str(value)]
    from topotune.service import searches

    cluster = connect(context, address, allow_open)
    text = file.read_text(encoding="utf-8")
    job_id = searches.submit(cluster, config, text, data, options, include or (), env_file)
    announce(cluster, config.name, job_id, wait, as_json)


def announce(cluster: JobsApi, name: str, job_id: str, wait: bool, as_json: bool = False) -> None:
    """Wait for a driver that was started, and say what one can do with it."""
    from topotune.service import searches

    say(f"{name}: job {job_id} on {cluster.address}", err=as_json)
    if wait:
        try:
            with waiting(f"{name}: until its driver begins"):
                searches.await_begin(cluster, job_id, name)
        except KeyboardInterrupt as error:
            rest = f". {name} goes on without being waited for; 'topotune stop {name}' ends it"
            raise InterruptError(error, rest) from None
        say(f"{name}: begun. This machine is no longer needed.", err=as_json)
    if as_json:
        print_json({"search": name, "job": job_id, "address": cluster.address})
        return
    typer.echo(
        f"  topotune logs {name} -f     # follow it\n"
        f"  topotune status {name}      # its trials\n"
        f"  topotune stop {name}        # save all and stop; 'resume' goes on"
    )


def list_searches(
    context: typer.Context,
    address: Address = None,
    allow_open: AllowOpen = False,
    as_json: AsJson = False,
) -> None:
    """List the searches on a cluster: state, trials, best, user."""
    import json

    cluster = connect(context, address, allow_open)
    found = _asked(cluster, ["status", "--json"])
    if found.code:
        pass_on(found.notes)
        raise typer.Exit(found.code)
    reports = {report["search"]: report for report in json.loads(found.out)}
    jobs = {job.search: job for job in reversed(cluster.jobs())}  # the newest of each
    rows = []
    for name in sorted({*reports, *jobs}):
        report, job = reports.get(name), jobs.get(name)
        best = report["best_values"] if report else None
        rows.append(
            {
                "name": name,
                "state": report["state"] if report else "not begun",
                "counts": report["counts"] if report else {},
                "best": best[0] if best else None,
                "user": job.user if job else "",
                "job": job.id if job else "",
                "job_status": job.status if job else "",
                "submitted": job.started if job else None,
            }
        )
    if as_json:
        print_json(rows)
        return
    table = plain_table("search", "state", "trials", "best", "user", "job", "submitted")
    for row in rows:
        counts = ", ".join(
            f"{count} {state.lower()}" for state, count in row["counts"].items() if count
        )
        value = "" if row["best"] is None else f"{row['best']:.4f}"
        since = row["submitted"]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(since)) if since else ""
        job = row["job_status"].lower()
        cells = (row["name"], row["state"], counts, value, row["user"], job, when)
        table.add_row(*(shown(cell).replace("[", "\\[") for cell in cells))
    console().print(table) if rows else say(f"no searches on {cluster.address}")


def logs(
    context: typer.Context,
    name: SearchName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends.")] = False,
    trial: Annotated[
        int | None, typer.Option(min=0, help="What this trial has printed, here or on a cluster.")
    ] = None,
    results_dir: ResultsDir = DEFAULT_RESULTS,
    address: Address = None,
    allow_open: AllowOpen = False,
) -> None:
    """Print what a search's driver or a trial has printed. Of several drivers on a cluster
    the newest."""

    def show(text: str) -> None:
        for line in text.splitlines(keepends=True):
            indent = line[: len(line) - len(line.lstrip(" \t"))]  # a traceback's
            end = "\n" if line.endswith("\n") else ""
            sys.stdout.write(indent + shown(line.rstrip("\r\n")) + end)
        sys.stdout.flush()

    if trial is not None:
        if follow:
            raise ConfigError("--follow", "follows a driver; --trial shows the output so far")
        if cluster := elsewhere(context, address):
            forward(context, cluster, ["--trial", str(trial)], name)
            return
        from topotune.search import status as reading

        show(reading.printed(results_dir, name, trial))
        return
    if elsewhere(context, address) is None:
        raise ConfigError(
            "logs",
            "shows a driver on a cluster, and no cluster is named",
            f"Give --address http://HEAD:8265 or set {ADDRESS}; --trial N shows what a trial of a "
            "search on this machine has printed",
        )
    from topotune.service import searches

    searches.logs(connect(context, address, allow_open), name, follow, show)


def stop(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="The search's name.", autocompletion=complete_name)
    ] = None,
    all_of_them: Annotated[bool, typer.Option("--all", help="All that run there.")] = False,
    address: Address = None,
    allow_open: AllowOpen = False,
) -> None:
    """Stop a search on a cluster. Trials finish their epoch, all is saved."""
    from topotune.service import searches

    if (name is None) != all_of_them:
        raise ConfigError("stop", "takes either a search's name or --all")
    cluster = connect(context, address, allow_open)
    for job in searches.stop(cluster, name, say):
        again = f"'topotune resume {job.search}' goes on"
        if not searches.has_begun(cluster, job):
            again = "before it began: nothing is kept"
        say(f"{job.search}: {job.status}; {again}")


def connect(context: typer.Context, address: str | None, allow_open: bool) -> JobsApi:
    """The cluster that a command is for.

    Raises:
        ConfigError: none is named.
    """
    place = elsewhere(context, address)
    if place is None:
        raise ConfigError(
            "--address",
            "no cluster is named",
            f"Give http://HEAD:8265, or set {ADDRESS}, or address in topotune.toml",
        )
    from topotune.service.jobs import JobsApi

    return JobsApi(place, allow_open, lambda text: say(f"note: {text}", err=True))


def forward(
    context: typer.Context,
    address: str,
    arguments: Sequence[str],
    name: str | None,
    as_json: bool = False,
    files: tuple[str, Path] | None = None,
) -> None:
    """Run a command on the cluster as if it ran here.

    Args:
        context: of the command.
        address: of the cluster.
        arguments: its options.
        name: the search that it is about; None for all.
        as_json: whether JSON is asked for.
        files: the folder that it makes there, and where its content goes here.
    """
    from topotune.search.code.shipped import from_archive

    command = [str(context.info_name), *([name] if name else []), *arguments]
    command += ["--json"] if as_json else []
    cluster = connect(context, address, bool(context.params.get("allow_open")))
    found = _asked(cluster, command, name)
    pass_on(found.notes)
    out = found.out
    if found.files and files is not None:
        there, here = files
        here.mkdir(parents=True, exist_ok=True)
        from_archive(found.files, here)
        out = out.replace(there, str(here))
    sys.stdout.write(out)
    if found.code:
        raise typer.Exit(found.code)


def _asked(cluster: JobsApi, command: Sequence[str], name: str | None = None) -> Answer:
    """Run a command there, of one search or of all, while a terminal says what is waited for."""
    from topotune.service.ask import ask

    with waiting(f"asking {cluster.address}"):
        return ask(cluster, command, name or "all")


def pass_on(notes: str) -> None:
    """Messages of a command that ran elsewhere."""
    if notes:
        sys.stderr.write(notes + "\n")


def arrive(version: str) -> None:
    """Make sure that a command that was sent to this cluster can be run here as it was meant.

    Raises:
        ConfigError: another version of topotune sent it, or no storage is named.
    """
    from topotune.search.code.shipped import load_env, own_copy

    if version != __version__:
        raise ConfigError(
            "topotune",
            f"version {version} sent this job, and the cluster has {__version__}",
            "Install the same version on both sides",
        )
    load_env(Path.cwd())
    own_copy(Path.cwd())
    storage = os.environ.get(STORAGE, "")
    if not storage or not ("://" in storage or Path(storage).is_absolute()):
        raise ConfigError(
            STORAGE,
            f"must name where all nodes see a search, and on the cluster's head it is {storage!r}",
            "Set it where Ray is started to a shared folder's whole path, s3:// or gs://",
        )


def package(
    name: SearchName,
    results_dir: ResultsDir = DEFAULT_RESULTS,
    unfinished: Annotated[bool, typer.Option(help="Show a finished search instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer with the code that a search was submitted with."""
    from topotune.cli.boards import print_status
    from topotune.errors import SearchFolderError
    from topotune.search import status as reading
    from topotune.search.place.folder import SearchFolder
    from topotune.search.place.objects.pull import fetch
    from topotune.search.place.search_lease import holder

    folder = SearchFolder.open(results_dir, name)
    driver = holder(folder, folder.config())
    if driver is not None:
        raise SearchFolderError(f"search {name!r}: is being driven by {driver}")
    if unfinished and reading.is_finished(folder):
        report = reading.status(results_dir, name)
        if as_json:
            print_json({**report.to_dict(), "finished": True})
            return
        print_status(console(), report, limit=10)
        return
    fetch(results_dir, name, "code/")
    if folder.code.is_dir():
        answer.bring(folder.code)
