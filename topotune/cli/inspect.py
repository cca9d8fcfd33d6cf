"""``status``, ``best``, ``dashboard`` and ``sync``: look at searches and ship what is left."""

from __future__ import annotations

from typing import Annotated

import typer

from topotune.cli.options import (
    DEFAULT_RESULTS,
    AsJson,
    ResultsDir,
    console,
    print_json,
    say,
    shown,
)
from topotune.errors import RunError


def status(
    name: Annotated[str | None, typer.Argument(help="A search; none lists all.")] = None,
    results_dir: ResultsDir = DEFAULT_RESULTS,
    as_json: AsJson = False,
) -> None:
    """How far searches are: counts, best so far, who drives them; one search's whole table."""
    from topotune.search import reading

    if name is not None:
        report = reading.status(results_dir, name)
        if as_json:
            print_json(report.to_dict())
            return
        from topotune.cli.boards import print_best, print_board

        out = console()
        out.print(shown(report.line()), markup=False)
        print_board(out, report.board, limit=len(report.board.trials))
        print_best(out, report.board)
        return
    from topotune.search.objects.address import shown as place

    reports = reading.all_status(results_dir, lambda text: say(text, err=True))
    if as_json:
        print_json([report.to_dict(trials=False) for report in reports])
        return
    for report in reports:
        say(report.line())
    if not reports:
        say(f"no searches in {place(results_dir)}")


def best(
    name: Annotated[str, typer.Argument(help="The search's name.")],
    results_dir: ResultsDir = DEFAULT_RESULTS,
    as_json: AsJson = False,
) -> None:
    """The best trial's complete config as YAML, ready for 'topotune train'."""
    from topotune.results.export import dump_yaml
    from topotune.search import reading

    report = reading.status(results_dir, name)
    winner = report.board.best
    if winner is None:
        raise RunError(f"search {name!r}: no trial finished within the constraints")
    if as_json:
        print_json(winner.to_dict())
        return
    figures = ", ".join(
        f"{metric} {value:.4f}"
        for metric, value in zip(report.board.objectives, winner.values, strict=True)
    )
    say(f"# search {name}, trial {winner.number}: {figures}")
    typer.echo(dump_yaml(dict(winner.spec)), nl=False)


def dashboard(
    name: Annotated[str | None, typer.Argument(help="A search whose pages are printed.")] = None,
    results_dir: ResultsDir = DEFAULT_RESULTS,
    port: Annotated[int, typer.Option(help="Preferred port on 127.0.0.1; 0: any.")] = 5000,
) -> None:
    """Serve the MLflow pages of the embedded store on 127.0.0.1 until Ctrl-C."""
    from topotune.search import reading

    reading.serve(results_dir, name, port, say)


def sync(
    name: Annotated[str, typer.Argument(help="The search's name.")],
    results_dir: ResultsDir = DEFAULT_RESULTS,
    timeout: Annotated[float, typer.Option(help="Seconds to try for.")] = 60.0,
) -> None:
    """Send to MLflow what a search recorded while the server was away, and compare counts."""
    from topotune.search import reading

    text, complete = reading.sync(results_dir, name, timeout)
    say(text)
    if not complete:
        raise typer.Exit(1)
