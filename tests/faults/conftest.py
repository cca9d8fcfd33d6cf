"""What the rows of the faults share: a site for each, and one folder for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.faults.site import Seen, Site


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "site" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(900))
            # MLflow's use of SQLAlchemy
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all rows, also where pytest-xdist runs them in several processes."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared-by-rows"


@pytest.fixture
def site(tmp_path: Path, shared: Path) -> Iterator[Site]:
    with Site(tmp_path / "site", shared) as site:
        yield site


@pytest.fixture
def seen(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Seen:
    record_property("row", " ".join(request.function.__doc__.split()))
    return partial(record_property, "seen")
