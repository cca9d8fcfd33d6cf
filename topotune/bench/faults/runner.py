"""Run rows of the fault matrix and print them as a table."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from topotune.bench.faults.scenario import BrokenPromiseError, Finding, Scenario
from topotune.bench.faults.site import Site


def run_one(scenario: Scenario, folder: Path, shared: Path) -> Finding:
    """Run one row in a folder of its own; a row that breaks is a finding, not an exception."""
    began = time.perf_counter()
    ok = False
    try:
        with Site(folder, shared) as site:
            seen = scenario.run(site)
        ok = True
    except BrokenPromiseError as error:
        seen = str(error)
    except Exception as error:  # noqa: BLE001 - a broken row must not end the table
        place = traceback.extract_tb(error.__traceback__)[-1]
        seen = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"
    seconds = time.perf_counter() - began
    return Finding(scenario.name, scenario.fault, scenario.expected, ok, seen, seconds)


def run(scenarios: Sequence[Scenario], say: Callable[[str], None]) -> Iterator[Finding]:
    """Run rows one after the other in a temporary folder, which is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="topotune-faults-") as scratch:
        for index, scenario in enumerate(scenarios, 1):
            say(f"{index}/{len(scenarios)} {scenario.name}: {scenario.fault}")
            yield run_one(scenario, Path(scratch) / scenario.name, Path(scratch) / "shared")


def table(findings: Sequence[Finding]) -> Table:
    """The matrix as a table, a failing row marked as failing."""
    good = sum(finding.ok for finding in findings)
    out = Table(title=f"{good} of {len(findings)} rows hold", title_justify="left")
    for heading in ("fault", "expected", "", "seen", "s"):
        out.add_column(heading, justify="right" if heading == "s" else "left")
    for finding in findings:
        verdict = "holds" if finding.ok else "FAILS"
        out.add_row(
            finding.fault, finding.expected, verdict, finding.seen, f"{finding.seconds:.0f}"
        )
    return out


def print_table(findings: Sequence[Finding]) -> None:
    """Print the matrix; wide where nobody looks, so that nothing is cut."""
    out = Console(highlight=False, markup=False)
    if not out.is_terminal:
        out = Console(highlight=False, markup=False, width=220)
    out.print(table(findings))
