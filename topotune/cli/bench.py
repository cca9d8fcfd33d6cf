"""``bench``: measure what the README claims, on this machine."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from topotune.cli.options import AsJson, print_json
from topotune.errors import ConfigError

app = typer.Typer(
    help="Measure what the README claims, on this machine.",
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
    """Measure equilibrium propagation: exact gradients, memory, solvers, and what it learns."""
    from topotune.bench.tcep.memory import STEPS
    from topotune.bench.tcep.run import DEFAULT_PARTS, Options, print_part, run, tell
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
    if as_json:
        print_json(run(options, tell).to_dict())
    else:
        run(options, tell, print_part)


@app.command()
def faults(
    row: Annotated[
        list[str] | None, typer.Option(help="Only this row; may be repeated. Default: all.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One or two short rows of every kind.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 1,
    as_json: AsJson = False,
) -> None:
    """Hurt real searches in every way that one can be hurt, and see whether anything is lost."""
    from topotune.bench.faults.registry import QUICK, named
    from topotune.bench.faults.runner import print_table, run

    scenarios = named(row or (QUICK if quick else ()))
    findings = list(run(scenarios, jobs, _tell))
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        print_table(findings)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def load(
    trials: Annotated[
        list[int] | None,
        typer.Option(
            min=2, help="Trials of a search; may be repeated. Default 125, 250, 500, 1000."
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Trials at once.", min=1)] = 8,
    as_json: AsJson = False,
) -> None:
    """Search over almost nothing a thousand times: what the driver costs, and whether it grows."""
    from topotune.bench.load import SIZES, print_report, run

    report = run(trials or SIZES, concurrency, _tell)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        print_report(report)


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
    postgres: Annotated[
        bool, typer.Option("--postgres", help="The study in a PostgreSQL server of its own.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Three short searches in place of all that.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Search with more and more worker slots: trials an hour, and what one driver can feed."""
    from topotune.bench.scaling.command import QUICK, Options, print_report, run

    options = Options(
        slots=_counts("--slots", slots),
        saturating=_counts("--saturating", saturating),
        rounds=rounds,
        saturating_rounds=saturating_rounds,
        sleep=sleep,
        trials_a_slot=trials,
    )
    chosen = dataclasses.replace(QUICK if quick else options, postgres=postgres)
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
        print_report(report)


def _counts(option: str, text: str) -> tuple[int, ...]:
    """Numbers from 1, between commas."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise ConfigError(option, f"expected numbers from 1 between commas, got {text!r}")
    return counts


@app.command()
def fuzz(
    inputs: Annotated[int, typer.Option(min=1, help="Inputs in all.")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the mutations.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Throw broken search files, configs, outboxes and results at their readers."""
    import logging

    from topotune.bench.fuzz import run
    from topotune.errors import RunError

    logging.disable(logging.CRITICAL)  # a broken outbox is logged line by line
    records = run(inputs, seed, _tell)
    if as_json:
        print_json([record.to_dict() for record in records])
    else:
        for record in records:
            typer.echo(record.line())
    broken = [failure.error for record in records for failure in record.failures]
    if broken:
        raise RunError(f"not an error of ours: {'; '.join(broken)}")


@app.command()
def tracking(
    children: Annotated[
        list[int] | None,
        typer.Option(min=10, help="Trials of a search; may be repeated. Default 125, 250, 500."),
    ] = None,
    points: Annotated[int, typer.Option(min=1000, help="Step-trace points.")] = 1_000_000,
    as_json: AsJson = False,
) -> None:
    """Ship many trials into one MLflow parent, and a very long step trace."""
    from topotune.bench.load_tracking import CHILDREN, print_records, run

    records = run(children or CHILDREN, points, _tell)
    if as_json:
        print_json([dataclasses.asdict(record) for record in records])
    else:
        print_records(records)
