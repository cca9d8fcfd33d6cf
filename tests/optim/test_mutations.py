"""Whatever state meets whatever parameters: torch's behaviour or our error, no dead process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 300), pytest.param(300, 6000, marks=pytest.mark.heavy)],
    ids=["some", "many"],
)
def test_random_mutations_in_a_child(first: int, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.optim_mutations", str(first), str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0, f"status {done.returncode} in {said[-1:]}: {done.stderr[-2000:]}"
    outcomes = [line for line in said if not line.startswith("case")]
    assert len(outcomes) == count
    for where in ("dict", "state", "data", "fields"):
        for end in ("refused", "went on"):
            assert any(o.startswith(where) and o.endswith(end) for o in outcomes), (where, end)
