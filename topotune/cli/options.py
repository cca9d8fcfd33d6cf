"""Options that several commands share, and how text is printed."""

from __future__ import annotations

import glob
import json
import logging
import os
import sys
import textwrap
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from topotune.config.spaces import find_space, shipped_spaces
from topotune.errors import ConfigError, FieldError
from topotune.redaction import redact
from topotune.results.text import clean
from topotune.settings import ADDRESS, STORAGE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from topotune.config.models import SearchConfig

DEFAULT_RESULTS = Path("topotune-results")


def results_dir(place: str | Path) -> Path:
    """The folder to work in for a results place: a path, or an object store's address."""
    from topotune.search.place.objects.address import results_folder

    return results_folder(str(place))


def _complete_file(incomplete: str) -> list[str]:
    """Shipped search files, and files and folders here, for the shell's completion."""
    found = glob.glob(f"{glob.escape(incomplete)}*")  # noqa: PTH207 - the text as it was typed
    here = [f"{path}/" if Path(path).is_dir() else path for path in found]
    return [name for name in shipped_spaces() if name.startswith(incomplete)] + sorted(here)


def complete_name(context: typer.Context, incomplete: str) -> list[str]:
    """Searches of the results folder on this machine, for the shell's completion."""
    place = context.params.get("results_dir") or os.environ.get(STORAGE) or DEFAULT_RESULTS
    if "://" in str(place):
        return []  # a key press asks no server
    found = Path(place).glob(f"{glob.escape(incomplete)}*/search.json")
    return sorted(path.parent.name for path in found)


SearchFile = Annotated[
    Path,
    typer.Argument(
        parser=find_space,
        metavar="FILE",
        help="The search file (YAML), or the name of a shipped one.",
        autocompletion=_complete_file,
    ),
]
SearchName = Annotated[str, typer.Argument(help="The search's name.", autocompletion=complete_name)]
ResultsDir = Annotated[
    Path,
    typer.Option(
        "--results-dir",
        parser=results_dir,
        metavar="PLACE",
        envvar=STORAGE,
        help="Where searches lie: a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX.",
        show_default=True,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar=ADDRESS,
        help="Ray's Jobs API of a cluster, http://HEAD:8265; local: this machine.",
    ),
]
AllowOpen = Annotated[
    bool, typer.Option("--allow-open", help="Also a cluster that asks for no token.")
]
EnvFile = Annotated[
    Path | None,
    typer.Option(help="Variables of driver and workers on the cluster, NAME=value a line."),
]
RayAddress = Annotated[
    str,
    typer.Option(
        "--ray-address",
        help="A Ray cluster to run on, such as auto or HOST:6379; local starts one.",
        show_default=True,
    ),
]
ChangedCode = Annotated[
    bool,
    typer.Option("--changed-code", help="Go on also where your own modules have changed since."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script to read.")]


def on_cluster(context: typer.Context) -> bool:
    """Whether this command was sent to the cluster that it runs on."""
    return bool(context.find_root().params.get("on_cluster"))


def typed(context: typer.Context, name: str) -> bool:
    """Whether a parameter of the command stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def elsewhere(context: typer.Context, address: str | None) -> str | None:
    """The cluster that a command is for; None for this machine.

    An address of the settings gives way to a ``--results-dir`` or ``--ray-address`` that is typed.

    Raises:
        ConfigError: both were typed.
    """
    if address in (None, "", "local") or on_cluster(context):
        return None

    for name in ("results_dir", "ray_address"):
        if typed(context, name):
            option = "--" + name.replace("_", "-")
            if typed(context, "address"):
                raise ConfigError(
                    option,
                    "is for a search that is driven from here, --address for one on a cluster, "
                    "whose own settings say where searches lie",
                    "Give one of the two",
                )
            return None
    return address


def shown(text: str) -> str:
    """One line that may hold names and messages of others, fit for a terminal: control characters
    become visible, secrets do not."""
    return clean(redact(text))


def say(text: str, err: bool = False) -> None:
    """Print :func:`shown` text as a line."""
    typer.echo(shown(text), err=err)


class _Shown(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "note" if record.levelno == logging.INFO else record.levelname
        return shown(f"{level} {record.getMessage()}")


def log_to_stderr() -> None:
    """Warnings, and which code an import path runs, on standard error, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Shown())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("topotune.plugins").setLevel(logging.INFO)


def json_text(data: Any) -> str:
    """Strict JSON with a last line end."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def print_json(data: Any) -> None:
    """Strict JSON on standard output."""
    sys.stdout.write(json_text(data))


def console() -> Console:
    """A console on standard output; wide where it is no terminal, so that no line is cut."""
    from rich.console import Console

    out = Console(highlight=False)
    width = os.environ.get("TOPOTUNE_WIDTH", "")
    return out if out.is_terminal else Console(highlight=False, width=int(width or 200))


def plain_table(*titles: str) -> Table:
    """A table without lines, its titles in bold."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title)
    return table


def say_whole(
    out: Console, line: str, style: str = "", *, first: str = "", indent: str = ""
) -> None:
    """Print a line, wrapped between words only: what is copied from it, such as a path, is whole.

    Args:
        out: where to.
        line: printable text.
        style: rich's name of a style.
        first, indent: what stands before its first and before each further line.
    """
    from rich.text import Text

    wrapped = textwrap.wrap(
        line,
        max(out.width, 20),
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    out.print(Text("\n".join(wrapped), style), soft_wrap=True)


def say_commands(out: Console, commands: Mapping[str, str]) -> None:
    """Print commands to be copied, each whole on a line, with what it does behind or above it."""
    longest = max(map(len, commands))
    room = longest + max(map(len, commands.values())) + 6 <= out.width
    for command, purpose in commands.items():
        if purpose and not room:
            out.print(f"  # {purpose}", style="dim", markup=False)
        behind = f"{command:{longest}}  # {purpose}" if purpose and room else command
        out.print(f"  {behind}", markup=False, soft_wrap=True)


def waiting(text: str) -> AbstractContextManager[object]:
    """Say on a terminal's standard error what is waited for; nothing elsewhere."""
    from rich.console import Console

    err = Console(stderr=True, highlight=False)
    return err.status(shown(text).replace("[", "\\[")) if err.is_terminal else nullcontext()


def build_faults(part: SearchConfig) -> list[FieldError]:
    """What keeps trials of a search from being built, looked for where its file has faults."""
    from topotune.search.doctor.preflight import faults

    return faults(part)


def with_options(data: object, changes: Mapping[tuple[str, ...], object]) -> object:
    """The file's data with options of the command line put over it."""
    if not isinstance(data, dict):
        return data
    for path, value in changes.items():
        if value is None:
            continue
        block = data
        for key in path[:-1]:
            inner = block.get(key, {})
            inner = {"name": inner} if isinstance(inner, str) else inner
            if not isinstance(inner, dict):
                break
            block[key] = inner
            block = inner
        else:
            block[path[-1]] = value
    return data
