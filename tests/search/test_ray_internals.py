"""Ray's private names are where topotune looks for them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import state, worker
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution import class_cache
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment.trial import Trial, _TemporaryTrialState

import topotune
from topotune.search.ray import ray_internals

NAMES: dict[str, tuple[Any, str]] = {
    "TuneController._pending_trials_list": (TuneController, "unplaced_trials"),
    "TuneController._trial_to_actor": (TuneController, "unplaced_trials"),
    "TuneController._actor_manager": (TuneController, "unplaced_trials"),
    "RayActorManager.is_actor_started": (RayActorManager, "unplaced_trials"),
    "TuneController._cleanup_cached_actors": (TuneController, "end_idle_workers"),
    "Trial.temporary_state": (Trial, "end_worker"),
    "_TemporaryTrialState.ray_actor": (_TemporaryTrialState, "end_worker"),
    "class_cache.ENV_VARS_TO_PROPAGATE": (class_cache, "keep_keys_off_command_lines"),
    "RayActorManager._actor_task_failed": (RayActorManager, "out_of_memory_is_a_death"),
    "worker.print_to_stdstream": (worker, "silence_processes"),
    "state.available_resources_per_node": (state, "free_by_node"),
    "GlobalState.get_cluster_config": (state.GlobalState, "cluster_config"),
}


@pytest.mark.parametrize("name", NAMES)
def test_ray_still_has_its_private_name(name: str) -> None:
    home, user = NAMES[name]
    attribute = name.rpartition(".")[2]
    # What an object gets when it is made stands in the source alone.
    there = hasattr(home, attribute) or f"self.{attribute}" in inspect.getsource(home)
    assert there, (
        f"Ray {ray.__version__} has moved {name}, which ray_internals.{user}() needs: "
        f"{inspect.getdoc(getattr(ray_internals, user))}"
    )


def test_tune_cleans_up_and_judges_with_these_arguments() -> None:
    assert "force_all" in inspect.signature(TuneController._cleanup_cached_actors).parameters
    judged = list(inspect.signature(RayActorManager._actor_task_failed).parameters)
    assert judged == ["self", "tracked_actor_task", "exception"]


def test_tune_still_does_not_know_a_worker_that_ran_out_of_memory() -> None:
    """If this fails, Ray has mended it: ``out_of_memory_is_a_death`` can go."""
    assert not issubclass(OutOfMemoryError, RayActorError)
    assert "OutOfMemoryError" not in inspect.getsource(RayActorManager)


def test_no_key_of_aws_reaches_a_command_line() -> None:
    ray_internals.keep_keys_off_command_lines()
    assert class_cache.ENV_VARS_TO_PROPAGATE
    assert not [name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]


def test_no_other_file_uses_a_private_name_of_ray() -> None:
    package = Path(topotune.__file__).parent
    private = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in NAMES}))
    wanted = re.compile(rf"\bfrom ray\.\S*\b_\w+|\bimport ray\._|\.(?:{private})\b")
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if wanted.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"search/ray/ray_internals.py"}
