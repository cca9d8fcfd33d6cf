"""``check``, ``schema``, ``spaces`` and ``tasks``: what a search file may hold, and whether one
does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topotune.cli.options import (
    AsJson,
    SearchFile,
    build_faults,
    console,
    json_text,
    log_to_stderr,
    plain_table,
    print_json,
    say,
    shown,
    with_options,
)


def check(
    file: SearchFile,
    data_dir: Annotated[str | None, typer.Option(help="Where data sets lie.")] = None,
    quick: Annotated[bool, typer.Option(help="Only the file's own rules; build nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Validate a search file. Shows its space; builds its task and method at every extreme."""
    from topotune.config.faults import located
    from topotune.config.file import parse_search, read_yaml
    from topotune.config.rules import remarks
    from topotune.config.space import describe, one_of
    from topotune.results.text import rich_text

    log_to_stderr()
    data, lines = read_yaml(file)
    data = with_options(data, {("task", "data_dir"): data_dir})
    also = (lambda part: []) if quick else build_faults
    config = parse_search(data, str(file), lines, also=also)
    metrics: list[str] = []
    notes = remarks(config)
    if not quick:
        from topotune.search.doctor.preflight import machine_remarks, preflight

        notes += machine_remarks(config)
        with located(str(file), lines):
            metrics = preflight(config, notes.append)
    if as_json:
        print_json({"config": config.model_dump(mode="json"), "metrics": metrics, "notes": notes})
        return
    out = console()
    table = plain_table("parameter", "range", "only when")
    for name, param in config.space.items():
        when = ", ".join(f"{parent} is {one_of(value)}" for parent, value in param.when.items())
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


def schema(
    out: Annotated[Path | None, typer.Option(help="Write it to this file instead.")] = None,
) -> None:
    """Print the JSON schema of a search file. Editors and other tools read it."""
    from topotune.config.models import json_schema

    if out is None:
        print_json(json_schema())
        return
    out.write_text(json_text(json_schema()), encoding="utf-8")
    say(
        f"{out}; an editor with YAML's language server reads it where a search file begins with "
        f"'# yaml-language-server: $schema={out}'"
    )


def spaces(
    copy: Annotated[
        Path | None, typer.Option(help="Copy them and their schema into this folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List or copy the shipped search files. 'search', 'check' and 'submit' know them by name."""
    from topotune.config.file import read_yaml
    from topotune.config.spaces import copy_spaces, shipped_spaces

    if copy is not None:
        copies = [str(path) for path in copy_spaces(copy)]
        print_json(copies) if as_json else say(f"{len(copies)} files in {copy}")
        return
    found = {name: read_yaml(path)[0]["description"] for name, path in shipped_spaces().items()}
    if as_json:
        print_json(found)
        return
    table = plain_table("name", "what")
    table.columns[0].no_wrap = True
    for row in found.items():
        table.add_row(*row)
    console().print(table)


def tasks(as_json: AsJson = False) -> None:
    """List the built-in tasks: metric, models, source of the data."""
    import dataclasses

    from topotune.tasks import describe_tasks

    found = describe_tasks()
    if as_json:
        print_json([dataclasses.asdict(info) for info in found])
        return
    table = plain_table("task", "objective", "models", "what", "data")
    for info in found:
        goal = f"{info.direction} val_{info.metric}"
        table.add_row(info.name, goal, ", ".join(info.models), info.summary, info.source)
    console().print(table)
