"""What rows saw, as the table that ``pytest --table`` prints."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from rich.console import Console
from rich.table import Table

NUMBER = re.compile(r"\d+(?:\.\d+)?")
RUN = re.compile(r"-?run\d+|\[run\d+\]")


@dataclass(frozen=True)
class Finding:
    """A row in all of its runs.

    Attributes:
        name: of the test.
        row: what is done and what must hold.
        held: how many runs held.
        seen: what each run saw, or what did not hold.
        seconds: of each run.
    """

    name: str
    row: str
    held: int
    seen: tuple[str, ...]
    seconds: tuple[float, ...]


def findings(reports: Sequence[pytest.TestReport]) -> list[Finding]:
    """The rows among the tests that have run: those with the fixture ``seen``."""
    runs: dict[tuple[str, str], list[pytest.TestReport]] = defaultdict(list)
    for report in reports:
        properties = dict(report.user_properties)
        if report.when == "call" and "row" in properties:
            name = RUN.sub("", report.nodeid.rpartition("::test_")[2])
            runs[name, str(properties["row"])].append(report)
    return [
        Finding(
            name,
            row,
            sum(report.passed for report in group),
            tuple(map(_seen, group)),
            tuple(report.duration for report in group),
        )
        for (name, row), group in runs.items()
    ]


def _seen(report: pytest.TestReport) -> str:
    if report.passed:
        return str(dict(report.user_properties).get("seen", ""))
    return report.longreprtext.rpartition("\nE ")[2].partition("\n")[0].strip()


def spread(texts: Sequence[str]) -> str:
    """One text with the range of each number, where only numbers differ; else all texts."""
    if len({NUMBER.sub("#", one) for one in texts}) > 1:
        return " | ".join(dict.fromkeys(texts))
    columns = zip(*(NUMBER.findall(one) for one in texts), strict=True)
    ranges = iter([_range(sorted(column, key=float)) for column in columns])
    return NUMBER.sub(lambda _: next(ranges), texts[0])


def _range(values: Sequence[str]) -> str:
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def table(found: Sequence[Finding]) -> Table:
    """The rows; one that failed is marked."""
    good = sum(one.held == len(one.seen) for one in found)
    out = Table(title=f"{good} of {len(found)} rows hold", title_justify="left")
    for heading in ("row", "what is done, and what holds", "", "seen", "s"):
        out.add_column(heading, justify="right" if heading == "s" else "left")
    for one in found:
        runs = len(one.seen)
        held = f"{one.held} of {runs} hold" if runs > 1 else "holds" if one.held else "FAILS"
        took = spread([f"{seconds:.0f}" for seconds in one.seconds])
        out.add_row(one.name, one.row, held, spread(one.seen), took)
    return out


def text(*tables: Table) -> str:
    """Tables as text, wide enough that nothing is cut."""
    out = Console(highlight=False, markup=False, width=220)
    with out.capture() as capture:
        out.print(*tables, sep="\n")
    return capture.get()
