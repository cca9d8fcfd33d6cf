"""``doctor``: what this machine offers, and what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from topotune.cli.cluster import forward
from topotune.cli.options import (
    DEFAULT_RESULTS,
    Address,
    AllowOpen,
    AsJson,
    ResultsDir,
    console,
    elsewhere,
    on_cluster,
    plain_table,
    print_json,
)
from topotune.settings import VARIABLES


def doctor(
    context: typer.Context,
    results_dir: ResultsDir = DEFAULT_RESULTS,
    ray: Annotated[bool, typer.Option(help="Start a local Ray and run a task on it.")] = True,
    data_dir: Annotated[Path | None, typer.Option(help="Where data sets lie.")] = None,
    address: Address = None,
    allow_open: AllowOpen = False,
    as_json: AsJson = False,
) -> None:
    """Check this machine, or a cluster and every node of it. Versions, devices, Ray, disk and
    stores; exit 2 if something is broken."""
    if cluster := elsewhere(context, address):
        forward(context, cluster, [], None, as_json)
        return
    if on_cluster(context):
        from topotune.search.doctor.cluster import Stores, examine_cluster
        from topotune.search.place.objects.address import store_address

        study, tracking = (os.environ.get(VARIABLES[key]) for key in ("study_uri", "tracking_uri"))
        storage = str(store_address(results_dir) or results_dir)
        findings = examine_cluster(Stores(storage, study, tracking))
    else:
        from topotune.search.doctor.machine import examine

        findings = examine(results_dir, data_dir, with_ray=ray)
    if as_json:
        print_json([finding.to_dict() for finding in findings])
    else:
        placed = any(one.place for one in findings)
        titles = ("check", "state", "found", "fix")
        table = plain_table(*(("where", *titles) if placed else titles))
        for one in findings:
            cells: tuple[str, ...] = (one.name, "ok" if one.ok else "BROKEN", one.found, one.fix)
            cells = (one.place, *cells) if placed else cells
            table.add_row(*(cell.replace("[", "\\[") for cell in cells))
        console().print(table)
    if not all(one.ok for one in findings):
        raise typer.Exit(2)
