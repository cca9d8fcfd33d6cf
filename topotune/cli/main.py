"""The ``topotune`` command: registers the command groups and turns errors into exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
import typer.core

from topotune import __version__
from topotune.cli import answer, bench, cluster, deliver, doctor, inspect, run, validate
from topotune.cli.options import shown
from topotune.cli.surroundings import give_a_home, open_closed_streams
from topotune.errors import FaultsError, InterruptError, TopotuneError
from topotune.search.drive.signals import discard
from topotune.settings import apply_settings

EPILOG = (
    "Exit codes: 0 done; 1 a run failed; 2 the input or the environment must change; "
    "130 interrupted, resumable with 'topotune resume NAME'."
)


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # Typer would end with 130 and not one word
            raise InterruptError(error) from None


app = typer.Typer(
    name="topotune",
    cls=_Commands,
    help="Distributed hyperparameter search for physics-inspired training.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMMANDS: tuple[Callable[..., None], ...] = (
    *(run.search, run.resume, run.extend),
    *(inspect.status, inspect.best, inspect.plot, inspect.dashboard, inspect.sync),
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
    open_closed_streams()
    give_a_home()
    if answer.asked():
        sys.exit(answer.answered(_main))
    _main()


def _main() -> None:
    """Run the command: runs the app; our errors become lines on stderr and an exit code."""
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
    except InterruptError as error:
        _end([str(error)], error.exit_code)
    except TopotuneError as error:
        faults = error.texts() if isinstance(error, FaultsError) else [str(error)]
        _end([f"error: {fault}" for fault in faults], error.exit_code)
    except OSError as error:  # of a path or of standard output; what a search meets it handles
        discard(1)
        place = "standard output" if error.filename is None else f"{error.filename!r:.200}"
        _end([f"error: {place}: {error.strerror}"], 2)
    except KeyboardInterrupt as error:  # before or after the command itself
        _end([str(InterruptError(error))], InterruptError.exit_code)


def _end(texts: list[str], exit_code: int) -> None:
    """Say why the command ends, if standard error takes it, and end it."""
    try:
        sys.stderr.writelines(f"{shown(text)}\n" for text in texts)
        sys.stderr.flush()
    except OSError:  # full or gone, too: the exit code still says it
        discard(2)
    sys.exit(exit_code)
