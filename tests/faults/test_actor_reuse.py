"""Nothing leaks between trials of one actor: first, fifth and alone give the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from topotune.config.budget import Limits
from topotune.records import Outcome, TrialSpec
from topotune.search.drive.book import Progress
from topotune.search.ray.session import RaySession
from topotune.search.ray.worker import TrialActor, trial_config
from topotune.search.view import SilentListener
from topotune.train.trial import TIMING_METRICS
from topotune.train.weights import load_weights

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(300)]

RINGS = "tests.faults.task:PacedRings"
LITTERING = "tests.faults.littering_task:Littering"
MARKED = "tests.faults.littering_task:Marked"


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with RaySession("local", SilentListener()):
        yield


def spec(task: str, **options: Any) -> TrialSpec:
    return TrialSpec(
        task=task,
        method="topological_adam",
        epochs=2,
        seed=7,
        params={"lr": 0.01},
        task_options=options,
        device="cpu",
        threads=1,
    )


def wait(future: Any) -> Any:
    """The value of a call on an actor."""
    return ray.get(future)


class Remote:
    """A worker's actor on Ray, driven as Tune drives it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._actor: Any = ray.remote(TrialActor).remote(config)

    def reset(self, config: dict[str, Any]) -> None:
        assert wait(self._actor.reset.remote(config, None))

    def train(self) -> list[Progress]:
        seen = []
        while True:
            result = wait(self._actor.train.remote())
            seen.append(Progress.from_json(result["payload"]))
            if result["done"]:
                return seen

    def end(self) -> None:
        wait(self._actor.stop.remote())
        ray.kill(self._actor)


def outcome(progress: list[Progress], one: TrialSpec, folder: Path) -> dict[str, Any]:
    """All that must repeat: end, metrics of every epoch, and the weights' bits."""
    assert progress[-1].outcome is Outcome.COMPLETE, progress[-1].reason
    digest = hashlib.sha256()
    for name, weight in sorted(load_weights(one, folder).items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    metrics = [
        {
            name: value
            for name, value in report.metrics.items()
            if name not in TIMING_METRICS and "overhead" not in name
        }
        for part in progress
        for report in part.reports
    ]
    return {"metrics": metrics, "weights": digest.hexdigest()}


@pytest.mark.parametrize("task", [RINGS, MARKED])
def test_first_fifth_and_alone_are_equal_bit_for_bit(
    session: None, task: str, tmp_path: Path
) -> None:
    one = spec(task)
    litter = ("torch", "python", "process", "model")

    (tmp_path / "search.json").touch()  # a node that does not see the search trains nothing

    def config(number: int, what: TrialSpec) -> dict[str, Any]:
        return trial_config(number, what, tmp_path, Limits(), Path.cwd())

    def folder(number: int) -> Path:
        return tmp_path / "trials" / f"{number:04d}"

    actor = Remote(config(0, one))
    first = outcome(actor.train(), one, folder(0))
    for number, kind in enumerate(litter, start=1):
        actor.reset(config(number, spec(LITTERING, kind=kind)))
        last = actor.train()[-1]
        if kind == "model":  # its hook breaks its own next batch
            assert last.outcome is Outcome.FAILED, last
            assert "a hook of an earlier trial" in last.reason, last
        else:
            assert last.outcome is Outcome.COMPLETE, last
    actor.reset(config(5, one))
    fifth = outcome(actor.train(), one, folder(5))
    actor.end()
    fresh = Remote(config(6, one))
    alone = outcome(fresh.train(), one, folder(6))
    fresh.end()
    assert json.dumps(first) == json.dumps(alone)
    assert json.dumps(fifth) == json.dumps(alone)
