"""The ``topotune`` command: registers the command groups and turns errors into exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from topotune import __version__
from topotune.cli import answer, bench, cluster, deliver, doctor, inspect, run, validate
from topotune.cli.options import shown
from topotune.errors import FaultsError, TopotuneError
from topotune.settings import apply_settings

EPILOG = (
    "Exit codes: 0 done; 1 a run failed; 2 the input or the environment must change; "
    "130 interrupted, resumable with 'topotune resume NAME'."
)

app = typer.Typer(
    name="topotune",
    help="Distributed hyperparameter search for physics-inspired training.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMMANDS: tuple[Callable[..., None], ...] = (
    *(run.search, run.resume, run.extend),
    *(inspect.status, inspect.best, inspect.dashboard, inspect.sync),
    *(deliver.export, deliver.train),
    *(cluster.submit, cluster.logs, cluster.stop),
    *(validate.check, validate.schema, validate.spaces, validate.tasks, doctor.doctor),
)
for _command in _COMMANDS:
    app.command()(_command)
app.command("list")(cluster.list_searches)
app.command(hidden=True)(cluster.package)
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    on_cluster: str | None = typer.Option(None, hidden=True),
) -> None:
    apply_settings(Path.cwd())
    if on_cluster is not None:
        cluster.arrive(on_cluster)
    if version:
        typer.echo(f"topotune {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point of the process."""
    if answer.asked():
        sys.exit(answer.answered(_main))
    _main()


def _main() -> None:
    """Run the command: runs the app; our errors become one line on stderr and an exit code."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # or a full disk would be met while Python ends
    except SystemExit as end:
        # Typer ends with 1, a failed run's code, where the reader of standard output has gone.
        if isinstance(end.__context__, BrokenPipeError):
            sys.exit(2)
        raise
    except TopotuneError as error:
        texts = error.texts() if isinstance(error, FaultsError) else [str(error)]
        sys.stderr.writelines(f"error: {shown(text)}\n" for text in texts)
        sys.exit(error.exit_code)
    except OSError as error:  # of a path or of standard output; what a search meets it handles
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        place = "standard output" if error.filename is None else f"{error.filename!r:.200}"
        sys.stderr.write(f"error: {shown(f'{place}: {error.strerror}')}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("aborted\n")
        sys.exit(130)
