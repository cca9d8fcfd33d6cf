"""``bench``: measure what the docs claim, on this machine."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import typer

from topotune.cli.options import AsJson, console, print_json
from topotune.errors import ConfigError

app = typer.Typer(
    help="Measure what the docs claim, on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _tell(text: str) -> None:
    """How far it is, on standard error."""
    typer.echo(text, err=True)


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
    """Time training steps against torch's Adam. Full steps, in alternating blocks."""
    from topotune.bench.optimizer import MODELS, run, step_table
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
        console().print(step_table(records))


@app.command()
def tcep(
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="gradients, memory, solvers, accuracy or all; may be repeated. Default: all but "
            "accuracy, which trains for minutes."
        ),
    ] = None,
    data: Annotated[
        str, typer.Option(help="Image task for all parts but accuracy, or random.")
    ] = "digits_rolled",
    task: Annotated[
        str, typer.Option(help="digits_rolled or mnist5k, for accuracy.")
    ] = "digits_rolled",
    seeds: Annotated[int | None, typer.Option(help="Seeds of accuracy; default 3.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of accuracy; default the task's own.")
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(help="Steps of memory; may be repeated. Default 10, 30, 100, 300, 1000."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Alternating rounds of what is timed.")] = 5,
    train_steps: Annotated[
        int, typer.Option(help="Steps that the trained nets of gradients and solvers get.")
    ] = 60,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure TCEP: gradients, memory, solvers, what it learns."""
    from topotune.bench.tcep.memory import STEPS
    from topotune.bench.tcep.run import DEFAULT_PARTS, Options, conditions, plain, run, tables
    from topotune.train.process import resolve_device

    options = Options(
        parts=tuple(part or DEFAULT_PARTS),
        data=data,
        task=task,
        seeds=seeds,
        epochs=epochs,
        steps=tuple(steps or STEPS),
        rounds=rounds,
        train_steps=train_steps,
        threads=threads,
        device=str(resolve_device(device)),
    )
    measured = run(options, _tell)
    if as_json:
        print_json(plain(options, measured))
        return
    under = conditions(options)
    typer.echo(
        f"{under['device']}, {threads} thread(s), torch {under['torch']}, data {data}, "
        f"batch {under['batch']}, {rounds} rounds"
    )
    for records in measured:
        console().print(*tables(records), sep="\n")
        sys.stdout.flush()


@app.command()
def scaling(
    slots: Annotated[
        str, typer.Option(help="Worker slots of the searches whose trials sleep.")
    ] = "1,2,4",
    saturating: Annotated[
        str, typer.Option(help="Slots of those whose trials do not, to find the driver's ceiling.")
    ] = "1,2,4,8",
    rounds: Annotated[int, typer.Option(help="Runs of each of --slots.", min=1)] = 2,
    saturating_rounds: Annotated[
        int, typer.Option(help="Runs of each of --saturating.", min=1)
    ] = 1,
    sleep: Annotated[
        float, typer.Option(help="Seconds of an epoch; 4 are a trial.", min=0.05)
    ] = 0.5,
    trials: Annotated[int, typer.Option(help="Trials for each of --slots.", min=3)] = 6,
    quick: Annotated[
        bool, typer.Option("--quick", help="Three short searches in place of all that.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Search with more and more worker slots. Trials an hour, and what one driver can feed.

    TOPOTUNE_STUDY_URI names a PostgreSQL database for the studies, as for any search.
    """
    from topotune.bench.scaling.command import QUICK, Options, run, summary, tables

    options = Options(
        slots=_counts("--slots", slots),
        saturating=_counts("--saturating", saturating),
        rounds=rounds,
        saturating_rounds=saturating_rounds,
        sleep=sleep,
        trials_a_slot=trials,
    )
    chosen = QUICK if quick else options
    if len(set(chosen.plans())) < 3:
        raise ConfigError(
            "--slots, --saturating",
            f"{slots} and {saturating} are two kinds of runs, which cannot tell apart what a "
            "second, a trial and an epoch cost the driver",
            "Give a second number of slots to one of them",
        )
    report = run(chosen, _tell)
    if as_json:
        print_json(report.to_dict())
    else:
        console().print(*tables(report), summary(report), sep="\n")


def _counts(option: str, text: str) -> tuple[int, ...]:
    """Numbers from 1, between commas."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise ConfigError(option, f"expected numbers from 1 between commas, got {text!r}")
    return counts
