"""What a thousand trials cost: the driver, the shipper, and a very long step trace.

``pytest -m load --table`` measures all and prints it; the default run takes a small part.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.load.driver import SIZES, Load, Mark, Size, tables
from tests.load.shipping import ship, shipping_table, trace, trace_table
from tests.tables import text

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's and SQLAlchemy's

CHILDREN, POINTS = (125, 250, 500), 1_000_000
GROWTH_KB = 150.0
"""Memory that the driver may gain a trial; twice of what it does."""
RecordProperty = Callable[[str, object], None]


def drive(sizes: Sequence[int], seconds: float) -> Load:
    """Searches of so many trials in a process of their own, whose memory is the driver's."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.load.driver", *map(str, sizes)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    load = json.loads(done.stdout)
    marks = tuple(Mark(**mark) for mark in load["marks"])
    return Load(load["concurrency"], marks, tuple(Size(**size) for size in load["sizes"]))


def check(load: Load, sizes: Sequence[int]) -> None:
    """Every size was measured, and all that was recorded is stored."""
    assert load.concurrency == 8
    assert [size.trials for size in load.sizes] == list(sizes)
    for size in load.sizes:
        recorded, stored = (int(part.split()[0]) for part in size.stored[8:].split(", "))
        assert recorded == stored > size.trials * 10
    assert load.marks[-1].trials == sizes[-1]
    for mark in load.marks:
        assert mark.memory_mb > 50
        assert mark.cpu_ms > 0


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_few_trials() -> None:
    load = drive([3], 250)
    check(load, [3])
    assert len(load.marks) == 1


@pytest.mark.load
@pytest.mark.timeout(3600)
def test_a_thousand_trials(record_property: RecordProperty) -> None:
    load = drive(SIZES, 3500)
    check(load, SIZES)
    assert load.growth_kb < GROWTH_KB
    record_property("table", text(*tables(load)))


@pytest.mark.heavy
def test_a_few_shipped_trials(tmp_path: Path) -> None:
    first, second = (ship(tmp_path / str(children), children) for children in (20, 40))
    assert (first.recorded, second.recorded) == (20 * 71, 40 * 71)
    assert (first.stored, second.stored) == (first.recorded, second.recorded)
    assert second.items > 1.9 * first.items
    one = trace(tmp_path / "trace", 20_000)
    assert one.points == 20_000
    assert 0.2 < one.size_mb < 1.0


@pytest.mark.load
@pytest.mark.timeout(1800)
def test_shipped_trials_and_a_long_trace(tmp_path: Path, record_property: RecordProperty) -> None:
    found = [ship(tmp_path / str(children), children) for children in CHILDREN]
    for one in found:
        assert one.stored == one.recorded == 71 * one.children
    points = trace(tmp_path / "trace", POINTS)
    assert points.points == POINTS
    record_property("table", text(shipping_table(found), trace_table(points)))
