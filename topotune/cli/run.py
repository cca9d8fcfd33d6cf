"""``search``, ``resume`` and ``extend``: run a search and print how it came out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topotune.cli.options import (
    DEFAULT_RESULTS,
    Address,
    AllowOpen,
    AsJson,
    ChangedCode,
    EnvFile,
    RayAddress,
    ResultsDir,
    SearchFile,
    SearchName,
    build_faults,
    console,
    elsewhere,
    log_to_stderr,
    on_cluster,
    print_json,
    say_commands,
    say_whole,
    shown,
    with_options,
)
from topotune.errors import ConfigError, InterruptError, RunError
from topotune.settings import STORAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from topotune.config.models import SearchConfig
    from topotune.search.driver import SearchReport
    from topotune.search.view import Listener

INTERRUPTED = 130


def search(
    context: typer.Context,
    file: SearchFile,
    results_dir: ResultsDir = DEFAULT_RESULTS,
    name: Annotated[str | None, typer.Option(help="Another name than the file's.")] = None,
    trials: Annotated[int | None, typer.Option(help="Another number of trials.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Another number of epochs.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Where data sets lie.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server; default MLFLOW_TRACKING_URI, else embedded.")
    ] = None,
    ray_address: RayAddress = "local",
    priority: Annotated[
        int | None, typer.Option(help="Its weight among other searches on a cluster.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a new search: leaderboard, best config, next commands."""
    from topotune.config.faults import located
    from topotune.config.file import parse_search, read_yaml

    data, lines = read_yaml(file)
    changes = {
        ("name",): name,
        ("budget", "trials"): trials,
        ("budget", "epochs"): epochs,
        ("task", "data_dir"): data_dir,
        ("tracking", "uri"): tracking_uri,
        ("resources", "priority"): priority,
    }
    try:
        config = parse_search(with_options(data, changes), str(file), lines, also=build_faults)
    except ConfigError as error:
        if tracking_uri is not None and error.place.endswith("tracking.uri"):
            raise ConfigError("--tracking-uri", error.problem, error.fix) from None
        raise
    from topotune.search import driver

    with located(str(file), lines):
        _finish(
            context,
            config,
            lambda listener: driver.start(
                config,
                file.read_text(encoding="utf-8"),
                results_dir,
                listener,
                ray_address,
                Path.cwd() if on_cluster(context) else None,
            ),
        )


def resume(
    context: typer.Context,
    name: SearchName,
    results_dir: ResultsDir = DEFAULT_RESULTS,
    ray_address: RayAddress = "local",
    address: Address = None,
    env_file: EnvFile = None,
    allow_open: AllowOpen = False,
    changed_code: ChangedCode = False,
    as_json: AsJson = False,
) -> None:
    """Continue a search. It was stopped or killed; finished epochs are not repeated."""
    _go_on(context, name)


def extend(
    context: typer.Context,
    name: SearchName,
    trials: Annotated[int, typer.Option(min=1, help="How many trials more.")],
    results_dir: ResultsDir = DEFAULT_RESULTS,
    ray_address: RayAddress = "local",
    address: Address = None,
    env_file: EnvFile = None,
    allow_open: AllowOpen = False,
    changed_code: ChangedCode = False,
    as_json: AsJson = False,
) -> None:
    """Add trials to a search, finished or not."""
    _go_on(context, name, trials)


def _go_on(context: typer.Context, name: str, trials: int = 0) -> None:
    """Resume a search, or extend it by trials, as the command's options say."""
    given = context.params
    results_dir, changed_code, as_json = (
        given[option] for option in ("results_dir", "changed_code", "as_json")
    )
    if address := elsewhere(context, given["address"]):
        from topotune.cli.cluster import announce, connect
        from topotune.service import searches

        cluster = connect(context, address, given["allow_open"])
        code = Path.cwd() if changed_code else None
        job_id, out = searches.again(cluster, name, trials, given["env_file"], as_json, code)
        if job_id:
            announce(cluster, name, job_id, True, as_json)
        else:
            typer.echo(out, nl=False)
        return
    from topotune.search import driver
    from topotune.search.place.folder import SearchFolder

    _finish(
        context,
        SearchFolder.open(results_dir, name).config(),
        lambda listener: driver.resume(
            results_dir,
            name,
            listener,
            trials,
            given["ray_address"],
            changed_code,
            Path.cwd() if on_cluster(context) and changed_code else None,
        ),
    )


def _finish(
    context: typer.Context, config: SearchConfig, work: Callable[[Listener], SearchReport]
) -> None:
    """Run with something to watch, print the outcome, exit with its code."""
    import contextlib
    import sys

    from topotune.cli.live import listener_for
    from topotune.search.drive.signals import discard, what_is_kept
    from topotune.search.view import SilentListener

    log_to_stderr()
    results_dir, as_json = context.params["results_dir"], context.params["as_json"]
    place = "" if on_cluster(context) else where(results_dir)
    try:
        if as_json:
            with contextlib.redirect_stdout(sys.stderr):  # a user's task may print
                report = work(SilentListener())
        else:
            with listener_for([objective.metric for objective in config.objective]) as listener:
                report = work(listener)
    except KeyboardInterrupt as error:
        begun = (results_dir / config.name / "search.json").is_file()
        raise InterruptError(error, f"; {what_is_kept(config.name, begun, place)}") from None
    try:
        if as_json:
            print_json(_as_data(report))
        else:
            _print(report, place)
        sys.stdout.flush()
    except OSError:  # the terminal or pipe is gone, and the results are on disk
        discard(sys.stdout.fileno())
    if not report.finished:
        raise typer.Exit(INTERRUPTED)
    if report.board.best is None:
        raise RunError(
            f"search {config.name!r}: no trial finished within the constraints "
            f"({report.board.summary}). The reasons are in the table above and in "
            f"'topotune status {config.name}'"
        )


def _as_data(report: SearchReport) -> dict[str, object]:
    return {
        **report.board.to_dict(),
        "finished": report.finished,
        "reason": report.reason,
        "folder": str(report.folder.root),
        "tracking": report.tracking,
    }


def where(results_dir: Path) -> str:
    """The option that the next commands need to find the search, as it is typed, such as
    `` --results-dir PLACE``; empty for the default."""
    from topotune.search.place.objects.address import results_folder, shown_place

    known = os.environ.get(STORAGE)
    if results_dir == DEFAULT_RESULTS or (known and results_folder(known) == results_dir):
        return ""
    return f" --results-dir {shown_place(results_dir)}"


def _print(report: SearchReport, where: str) -> None:
    from topotune.cli.boards import print_best, print_board
    from topotune.search.place.objects.address import shown_search

    out = console()
    name = report.config.name
    out.print()
    print_board(out, report.board, 10, where)
    print_best(out, report.board)
    say_whole(out, shown(report.tracking))
    say_whole(out, f"Results: {shown_search(report.folder.root)}")
    if not report.finished:
        out.print()
        say_whole(out, f"Not finished ({shown(report.reason)}). To go on:")
        say_commands(out, {f"topotune resume {name}{where}": ""})
        return
    if report.reason:
        out.print()
        say_whole(out, f"Finished: {shown(report.reason)}")
    if report.board.best is None:
        return
    chosen = "--top 3" if len(report.board.objectives) == 1 else "--front"
    commands = {
        f"topotune dashboard {name}{where}": "look at it in MLflow",
        f"topotune export {name} {chosen} --verify{where}": "configs, weights, model cards",
    }
    if more := _more_trials(report.config):
        commands[f"topotune extend {name} --trials {more}{where}"] = "search on"
    out.print("\nNext:")
    say_commands(out, commands)


def _more_trials(config: SearchConfig) -> int:
    """With how many trials a finished search may be extended, 20 at most; 0 where it cannot be."""
    from topotune.config.rules import planned_trials
    from topotune.search.driver import extended

    try:
        after = extended(config, 20).budget.trials
    except ConfigError:
        return 0
    return (after or 0) - (planned_trials(config) or 0)
