"""``status``, ``best``, ``plot``, ``dashboard``, ``sync``: look at searches, ship what is left."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from topotune.cli import answer
from topotune.cli.cluster import forward
from topotune.cli.options import (
    DEFAULT_RESULTS,
    Address,
    AllowOpen,
    AsJson,
    ResultsDir,
    SearchName,
    complete_name,
    console,
    elsewhere,
    on_cluster,
    print_json,
    say,
    say_whole,
    shown,
)
from topotune.errors import ConfigError, RunError
from topotune.settings import VARIABLES


def status(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(help="A search; none lists all.", autocompletion=complete_name),
    ] = None,
    results_dir: ResultsDir = DEFAULT_RESULTS,
    address: Address = None,
    allow_open: AllowOpen = False,
    as_json: AsJson = False,
) -> None:
    """Show how far searches are. Counts, best so far, who drives them; one search's whole table."""
    if cluster := elsewhere(context, address):
        forward(context, cluster, [], name, as_json)
        return
    from topotune.search import status as reading

    if name is not None:
        report = reading.status(results_dir, name)
        if as_json:
            print_json(report.to_dict())
            return
        from topotune.cli.boards import print_status

        print_status(console(), report, limit=len(report.board.trials))
        return
    from topotune.search.place.objects.address import shown_place as place

    reports = reading.all_status(results_dir, lambda text: say(text, err=True))
    if as_json:
        print_json([report.to_dict(trials=False) for report in reports])
        return
    for report in reports:
        say(report.line())
    if not reports:
        say(f"no searches in {place(results_dir)}")


def best(
    context: typer.Context,
    name: SearchName,
    results_dir: ResultsDir = DEFAULT_RESULTS,
    address: Address = None,
    allow_open: AllowOpen = False,
    as_json: AsJson = False,
) -> None:
    """Print the best trial's config as YAML, for 'topotune train'.

    With several objectives it is that of the front which is best in the first one; the others
    stand in comments."""
    if cluster := elsewhere(context, address):
        forward(context, cluster, [], name, as_json)
        return
    from topotune.results.leaderboard import valued
    from topotune.results.yamltext import dump_yaml
    from topotune.search import status as reading

    report = reading.status(results_dir, name)
    winner = report.board.best
    if winner is None:
        raise RunError(f"search {name!r}: no trial finished within the constraints")
    front = report.board.front
    if as_json:
        several = len(report.board.objectives) > 1
        whole = {"front": [trial.to_dict() for trial in front]} if several else {}
        print_json({**winner.to_dict(), **whole})
        return
    head = [f"search {name}, trial {winner.number}: {valued(winner, report.board.objectives)}"]
    if len(front) > 1:
        head.append(
            f"It is the first of a front of {len(front)}; topotune export {name} --front has all"
        )
        for trial in front[1:]:
            head.append(f"trial {trial.number}: {valued(trial, report.board.objectives)}")
    for line in head:
        say_whole(console(), shown(line), first="# ", indent="#   ")
    typer.echo(dump_yaml(dict(winner.spec)), nl=False)


def plot(
    context: typer.Context,
    name: SearchName,
    trial: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Figures of this trial instead; may be repeated."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Those of every trial, too.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder; default topotune-plots/NAME.")] = None,
    results_dir: ResultsDir = DEFAULT_RESULTS,
    address: Address = None,
    allow_open: AllowOpen = False,
    as_json: AsJson = False,
) -> None:
    """Draw a search's history, curves and front. With --trial, what a trial did step by step."""
    if trial and every:
        raise ConfigError("--all", "draws every trial, --trial those that are named", "Give one")
    target = out if out is not None else Path("topotune-plots") / name
    if cluster := elsewhere(context, address):
        there = f"plots-{secrets.token_hex(4)}"
        chosen = ["--all"] if every else [f"--trial={number}" for number in trial or ()]
        forward(context, cluster, [*chosen, "--out", there], name, as_json, files=(there, target))
        return
    from topotune.search import status as reading

    trials = None if every else trial or []
    drawn = reading.plot(results_dir, name, trials, target, lambda text: say(text, err=True))
    answer.bring(target)
    if as_json:
        print_json([str(picture) for picture in drawn])
        return
    for picture in drawn:
        say(str(picture))


def dashboard(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(help="A search whose pages are printed.", autocompletion=complete_name),
    ] = None,
    results_dir: ResultsDir = DEFAULT_RESULTS,
    port: Annotated[
        int | None,
        typer.Option(help="Preferred port on 127.0.0.1; 0: any. Default 5000; with --optuna 8080."),
    ] = None,
    optuna: Annotated[
        bool,
        typer.Option(
            "--optuna", help="Serve optuna-dashboard on the search's study instead, read-only."
        ),
    ] = False,
    address: Address = None,
    allow_open: AllowOpen = False,
) -> None:
    """Say where MLflow's pages are. Serves those of the embedded store on 127.0.0.1 until
    Ctrl-C."""
    if cluster := elsewhere(context, address):
        if optuna:
            raise ConfigError(
                "--optuna",
                "serves from this machine, which needs the study's database and the storage",
                f"Give --results-dir, and the database in {VARIABLES['study_uri']}",
            )
        forward(context, cluster, [], name)
        return
    if optuna:
        from topotune.search.study import optuna_pages

        optuna_pages.serve(results_dir, name, optuna_pages.PORT if port is None else port, say)
        return
    from topotune.search import status as reading
    from topotune.tracking.serve import DEFAULT_PORT

    if on_cluster(context) and not os.environ.get(VARIABLES["tracking_uri"]):
        raise ConfigError(
            VARIABLES["tracking_uri"],
            "names no server on the cluster, so that no pages can be reached from elsewhere",
            "Start 'mlflow server' and set it where Ray is started",
        )

    reading.serve(results_dir, name, DEFAULT_PORT if port is None else port, say)


def sync(
    context: typer.Context,
    name: SearchName,
    results_dir: ResultsDir = DEFAULT_RESULTS,
    timeout: Annotated[float, typer.Option(help="Seconds to try for.")] = 60.0,
    address: Address = None,
    allow_open: AllowOpen = False,
) -> None:
    """Send to MLflow what it missed. Then compares the counts."""
    if cluster := elsewhere(context, address):
        forward(context, cluster, ["--timeout", str(timeout)], name)
        return
    from topotune.search import status as reading

    text, complete = reading.sync(results_dir, name, timeout)
    say(text)
    if not complete:
        raise typer.Exit(1)
