"""Which trial gets the worker of one that has ended."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from tests.search_cases import Desk, make_config
from topotune.search.drive.book import Progress
from topotune.search.ray.tune import StudyScheduler


def controller(*trials: tuple[str, str | None]) -> Any:
    """What Tune knows of pending trials: their state, and that of the worker asked for."""
    known = [SimpleNamespace(status=status, name=f"{i}") for i, (status, _) in enumerate(trials)]
    workers = [worker for _, worker in trials]
    return SimpleNamespace(
        _pending_trials_list=known,
        _trial_to_actor=SimpleNamespace(get=lambda trial: workers[int(trial.name)]),
        _actor_manager=SimpleNamespace(is_actor_started=lambda worker: worker == "loads"),
    )


@pytest.mark.parametrize(
    ("trials", "chosen"),
    [
        ([(Trial.PENDING, "loads"), (Trial.PENDING, None)], "1"),
        ([(Trial.PENDING, "loads"), (Trial.PENDING, "waits"), (Trial.PENDING, None)], "1"),
        ([(Trial.RUNNING, "waits"), (Trial.PENDING, "waits")], "1"),
        ([(Trial.PENDING, None), (Trial.PENDING, "waits")], "0"),
        ([(Trial.PENDING, "loads"), (Trial.PENDING, "loads")], None),
        ([], None),
    ],
)
def test_a_trial_whose_worker_loads_keeps_it(
    trials: list[tuple[str, str | None]], chosen: str | None, tmp_path: Path
) -> None:
    def request(trial: dict[str, Any]) -> PlacementGroupFactory:
        return PlacementGroupFactory([{"CPU": 1.0}])

    book = Desk(tmp_path, make_config()).book
    scheduler = StudyScheduler(
        book, lambda number: tmp_path, lambda number: Progress(), lambda text: None, request
    )
    found: Any = scheduler.choose_trial_to_run(controller(*trials))
    assert (found and found.name) == chosen
