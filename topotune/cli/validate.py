"""``check``, ``schema`` and ``tasks``: what a search file may hold, and whether one does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topotune.cli.options import AsJson, changed, console, log_to_stderr, print_json, shown


def check(
    file: Annotated[Path, typer.Argument(help="The search file (YAML).")],
    data_dir: Annotated[str | None, typer.Option(help="Where data sets lie.")] = None,
    quick: Annotated[bool, typer.Option(help="Only the file's own rules; build nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Validate a search file, show its space, and build its task and method at every extreme."""
    from topotune.config_remarks import remarks
    from topotune.config_rules import describe
    from topotune.configfile import parse_search, read_yaml
    from topotune.results.text import rich_text

    log_to_stderr()
    data, lines = read_yaml(file)
    config = parse_search(changed(data, {("task", "data_dir"): data_dir}), str(file), lines)
    metrics: list[str] = []
    notes = remarks(config)
    if not quick:
        from topotune.search.preflight import machine_remarks, preflight

        notes += machine_remarks(config)
        metrics = preflight(config, notes.append)
    if as_json:
        print_json({"config": config.model_dump(mode="json"), "metrics": metrics, "notes": notes})
        return
    from rich.table import Table

    out = console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("parameter", "range", "only when"):
        table.add_column(title)
    for name, param in config.space.items():
        when = ", ".join(f"{parent} is {wanted}" for parent, wanted in param.when.items())
        table.add_row(*(rich_text(text) for text in (name, describe(param), when)))
    goals = ", ".join(f"{o.direction} {o.metric}" for o in config.objective)
    out.print(shown(f"{config.name}: {config.method} on {config.task.name}, {goals}"), markup=False)
    out.print(table)
    for name, value in config.fixed.items():
        out.print(shown(f"fixed {name}: {value}"), markup=False)
    budget = config.budget
    out.print(
        f"{budget.trials or 'unlimited'} trials of {budget.epochs} epochs, sampler "
        f"{config.sampler.name}, pruner {config.pruner.name}, seed {config.seed}",
        markup=False,
    )
    for note in notes:
        out.print(shown(f"note: {note}"), markup=False)
    if metrics:
        out.print(shown(f"metrics: {', '.join(metrics)}"), markup=False)
    out.print("ok" if not quick else "ok (the file's own rules)", markup=False)


def schema() -> None:
    """Print the JSON schema of a search file."""
    from topotune.config import json_schema

    print_json(json_schema())


def tasks(as_json: AsJson = False) -> None:
    """List the built-in tasks: metric, models, where the data come from."""
    import dataclasses

    from topotune.tasks import describe_tasks

    found = describe_tasks()
    if as_json:
        print_json([dataclasses.asdict(info) for info in found])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("task", "objective", "models", "what", "data"):
        table.add_column(title)
    for info in found:
        goal = f"{info.direction} val_{info.metric}"
        table.add_row(info.name, goal, ", ".join(info.models), info.summary, info.source)
    console().print(table)
