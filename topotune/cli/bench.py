"""``bench``: measure what the README claims, on this machine."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from topotune.cli.options import AsJson, print_json

app = typer.Typer(
    help="Measure what the README claims, on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _root() -> None:
    """Keeps the group a group while it has one command."""


@app.command()
def optimizer(
    model: Annotated[
        list[str] | None, typer.Option(help="mlp, cnn; may be repeated. Default both.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Blocks a contender.")] = 20,
    steps: Annotated[
        int | None, typer.Option(help="Training steps a block; default 10 (mlp), 1 (cnn).")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Time full training steps: Topological Adam against torch's Adam, alternating blocks."""
    from topotune.bench.optimizer import MODELS, print_table, run
    from topotune.train.process import resolve_device

    records = run(
        model or list(MODELS),
        rounds=rounds,
        steps=steps,
        threads=threads,
        device=str(resolve_device(device)),
    )
    if as_json:
        print_json([dataclasses.asdict(record) for record in records])
    else:
        print_table(records)
