"""``bench``: measure what the README claims, on this machine."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Measure what the README claims, on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _root() -> None:
    pass
