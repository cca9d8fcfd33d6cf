"""Every row of the fault matrix as a test: real searches, real kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from topotune.bench.faults.registry import named
from topotune.bench.faults.runner import run_one
from topotune.bench.faults.scenario import Scenario

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's use of SQLAlchemy
]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.mark.parametrize("scenario", named(None, slow=False), ids=lambda s: s.name)
def test_row(scenario: Scenario, tmp_path: Path, shared: Path) -> None:
    finding = run_one(scenario, tmp_path / "site", shared)
    assert finding.ok, f"{scenario.fault}: expected: {scenario.expected}; seen: {finding.seen}"
