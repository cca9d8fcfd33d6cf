"""Every row of the fault matrix as a test: real searches, real kills."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from topotune.bench.faults.registry import named
from topotune.bench.faults.runner import run_one
from topotune.bench.faults.scenario import Scenario

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's use of SQLAlchemy
]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all rows, also where pytest-xdist runs them in several processes."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared-by-rows"


def rows() -> list[ParameterSet]:
    return [
        pytest.param(row, id=row.name, marks=[pytest.mark.alone] if row.alone else [])
        for row in named(None, slow=False)
    ]


@pytest.mark.parametrize("scenario", rows())
def test_row(scenario: Scenario, tmp_path: Path, shared: Path) -> None:
    finding = run_one(scenario, tmp_path / "site", shared)
    assert finding.ok, f"{scenario.fault}: expected: {scenario.expected}; seen: {finding.seen}"
