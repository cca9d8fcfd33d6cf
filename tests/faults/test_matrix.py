"""Every row of the fault matrix as a test: real searches, real kills.

Those of ``bench faults --quick`` have the marker ``faults``, the rest ``faults_full``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from topotune.bench.faults.registry import QUICK, SCENARIOS
from topotune.bench.faults.runner import run_one
from topotune.bench.faults.scenario import Scenario

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's use of SQLAlchemy
]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all rows, also where pytest-xdist runs them in several processes."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared-by-rows"


def rows() -> list[ParameterSet]:
    return [pytest.param(row, id=row.name, marks=marks(row)) for row in SCENARIOS]


def marks(row: Scenario) -> list[pytest.MarkDecorator]:
    kind = pytest.mark.faults if row.name in QUICK else pytest.mark.faults_full
    return [kind, pytest.mark.alone] if row.alone else [kind]


@pytest.mark.parametrize("scenario", rows())
def test_row(scenario: Scenario, tmp_path: Path, shared: Path) -> None:
    finding = run_one(scenario, tmp_path / "site", shared)
    assert finding.ok, f"{scenario.fault}: expected: {scenario.expected}; seen: {finding.seen}"
