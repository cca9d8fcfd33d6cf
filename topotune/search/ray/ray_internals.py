"""Ray's private names, all that topotune uses, each with its reason.

Ray may move them in any release; ``tests/search/test_ray_internals.py`` then says which and why it
was needed. Ray is imported inside of the functions: its settings are read when it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.tune.experiment import Trial


def unplaced_trials(tune_controller: Any) -> list[Trial]:
    """Pending trials whose own worker does not load yet, in the order they were handed out.

    Tune's public interface gives a scheduler all trials that ever were, and nothing of workers.
    """
    started = tune_controller._actor_manager.is_actor_started
    actors = tune_controller._trial_to_actor
    return [
        trial
        for trial in tune_controller._pending_trials_list
        if (actor := actors.get(trial)) is None or not started(actor)
    ]


def end_idle_workers(tune_controller: Any) -> None:
    """Give back what the worker of a trial that was handed back holds of a shared cluster: Tune
    would keep it for another trial."""
    tune_controller._cleanup_cached_actors(force_all=True)


def end_worker(trial: Trial) -> None:
    """Kill a trial's worker process, if it has one: Tune itself only asks it to end."""
    import ray

    actor = trial.temporary_state.ray_actor
    if actor is not None:
        ray.kill(actor)


def keep_keys_off_command_lines() -> None:
    """Tune hands variables with keys of AWS to its workers on their command lines, which everybody
    on the machine and Ray's logs can read; workers have the environment of their node anyway."""
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    names.difference_update([name for name in names if name.startswith("AWS_")])


@contextmanager
def out_of_memory_is_a_death() -> Iterator[None]:
    """Let Tune take a worker that Ray ended for its node's memory for a dead worker.

    Ray then raises an OutOfMemoryError, which is neither of the two kinds of error that Tune's
    actor manager expects, and the whole experiment ends.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    original = RayActorManager._actor_task_failed

    def failed(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        original(manager, tracked_actor_task, exception)

    setattr(RayActorManager, original.__name__, failed)
    try:
        yield
    finally:
        setattr(RayActorManager, original.__name__, original)


def silence_processes() -> None:
    """Ray prints what happened to its processes, hundreds of lines, whatever its settings say;
    what matters of it is in a trial's reason."""
    from ray._private import worker

    vars(worker)["print_to_stdstream"] = lambda *_, **__: None


def free_by_node() -> dict[str, dict[str, float]]:
    """Node id to what is free on it; the public ``available_resources`` gives the sum alone."""
    from ray._private.state import available_resources_per_node

    found: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    return found


def cluster_config() -> Any:
    """What the cluster may grow to, as a platform has reported it to Ray's GCS; None where none
    has. In 2.60 the raw form of ``get_max_resources_from_cluster_config``, which has no sizes of
    nodes."""
    from ray._private.state import state

    return state.get_cluster_config()
