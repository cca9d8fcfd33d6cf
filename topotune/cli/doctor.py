"""``doctor``: what this machine offers, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topotune.cli.options import DEFAULT_RESULTS, AsJson, ResultsDir, console, print_json


def doctor(
    results_dir: ResultsDir = DEFAULT_RESULTS,
    ray: Annotated[bool, typer.Option(help="Start a local Ray and run a task on it.")] = True,
    data_dir: Annotated[Path | None, typer.Option(help="Where data sets lie.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check versions, devices, Ray, disk and write access; exit 1 if something is broken."""
    from topotune.search.health import examine

    findings = examine(results_dir, data_dir, with_ray=ray)
    if as_json:
        print_json([finding.to_dict() for finding in findings])
    else:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("check", "state", "found", "fix"):
            table.add_column(title)
        for one in findings:
            cells = (one.name, "ok" if one.ok else "BROKEN", one.found, one.fix)
            table.add_row(*(cell.replace("[", "\\[") for cell in cells))
        console().print(table)
    if not all(one.ok for one in findings):
        raise typer.Exit(1)
