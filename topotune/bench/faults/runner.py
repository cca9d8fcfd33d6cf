"""Run rows of the fault matrix and print them as a table."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
from rich.table import Table

from topotune.bench.console import wide_console
from topotune.bench.faults.registry import named
from topotune.bench.faults.scenario import BrokenPromiseError, Finding, Scenario
from topotune.bench.faults.site import Site, marked
from topotune.search.drive.signals import Interrupts

_SCRATCH = "TOPOTUNE_FAULTS_SCRATCH"


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


def run(scenarios: Sequence[Scenario], jobs: int, say: Callable[[str], None]) -> Iterator[Finding]:
    """Run rows in processes and folders of their own; both are gone in the end, as after Ctrl-C,
    SIGTERM and SIGHUP.

    Args:
        scenarios: what is run; those that must be alone come last.
        jobs: rows at once.
        say: told, in a line, how each came out.
    """
    together = [scenario for scenario in scenarios if not scenario.alone]
    alone = [scenario for scenario in scenarios if scenario.alone]
    spawn = multiprocessing.get_context("spawn")  # a row may change its process's environment
    with Interrupts(), tempfile.TemporaryDirectory(prefix="topotune-faults-") as scratch:
        shared = Path(scratch) / "shared"
        done = 0
        for rows, workers in ((together, jobs), (alone, 1)):
            with (
                ProcessPoolExecutor(
                    workers, mp_context=spawn, initializer=_mark, initargs=(scratch,)
                ) as pool,
                _ended_when_cut_short(scratch),
            ):
                folders = [Path(scratch) / scenario.name for scenario in rows]
                names = [scenario.name for scenario in rows]
                for finding in pool.map(_run_named, names, folders, [shared] * len(rows)):
                    done += 1
                    verdict = "holds" if finding.ok else "FAILS"
                    say(
                        f"{done}/{len(scenarios)} {finding.name} {verdict} after "
                        f"{finding.seconds:.0f} s: {finding.seen}"
                    )
                    yield finding


def _mark(scratch: str) -> None:
    """In a row's process: all that it starts can be told by its environment, however detached."""
    os.environ[_SCRATCH] = scratch


@contextlib.contextmanager
def _ended_when_cut_short(scratch: str) -> Iterator[None]:
    """End the rows and all that they started where the block is left early: the pool would wait
    for them, and a row that is killed cannot clean up."""
    try:
        yield
    except BaseException:
        for row in multiprocessing.active_children():
            row.kill()
            row.join()
        while left := marked(_SCRATCH, scratch):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, 1)
        raise


def _run_named(name: str, folder: Path, shared: Path) -> Finding:
    (scenario,) = named([name])
    return run_one(scenario, folder, shared)


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
    """Print the matrix."""
    wide_console().print(table(findings))
