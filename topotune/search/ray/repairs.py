"""What Ray Tune gets wrong about the deaths of its workers, put right from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
