"""The driver's side of sharing a cluster: sends its demand every few seconds, and gets its share.

The demands of all searches lie in one Ray actor of a known name, which the driver that is first
makes. It goes with that driver; the next one to speak makes another, and within seconds all demands
are there again. Until then each search keeps its share.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from topotune.search.share import Demand, Demands, Share

NAME, NAMESPACE = "topotune-demands", "topotune"
DEMAND_SECONDS = 2.0
_LATE_SECONDS = 15.0


class DemandsActor:
    """:class:`~topotune.search.share.Demands` in a process of the cluster."""

    def __init__(self) -> None:
        self._demands = Demands()

    def register(self, demand: Demand, capacity: Mapping[str, float]) -> Share:
        """As :meth:`Demands.register`, by this process's clock."""
        return self._demands.register(demand, capacity, time.monotonic())

    def leave(self, search: str) -> None:
        """As :meth:`Demands.leave`."""
        self._demands.leave(search)


class Sharing:
    """A search's part in the sharing; waits for no answer.

    Args:
        search: its unique id.
        demand: its present demand.
        capacity: resource to amount of the whole cluster, as it is now.
    """

    def __init__(
        self, search: str, demand: Callable[[], Demand], capacity: Callable[[], dict[str, float]]
    ) -> None:
        self._search, self._demand, self._capacity = search, demand, capacity
        self._actor: Any = None
        self._answer: Any = None
        self._asked = 0.0
        self.share: Share | None = None

    def tick(self) -> None:
        """Receive an answer that has come; ask again when it is time."""
        now = time.monotonic()
        try:
            if self._answer is not None:
                ready, _ = ray.wait([self._answer], timeout=0)
                if ready:
                    self.share, self._answer = ray.get(ready[0]), None
                elif now - self._asked > _LATE_SECONDS:
                    self._actor = self._answer = None
            if self._answer is None and now - self._asked >= DEMAND_SECONDS:
                self._asked = now
                if self._actor is None:
                    self._actor = (
                        ray.remote(DemandsActor)
                        .options(name=NAME, namespace=NAMESPACE, get_if_exists=True, num_cpus=0)
                        .remote()
                    )
                self._answer = self._actor.register.remote(self._demand(), self._capacity())
        except (RayError, ValueError):  # its driver ended, or two made it at the same moment
            self._actor = self._answer = None

    def wait(self, seconds: float) -> None:
        """Wait for a first answer, at most so long."""
        end = time.monotonic() + seconds
        while self.share is None and time.monotonic() < end:
            self.tick()
            time.sleep(0.05)

    def close(self) -> None:
        """Give the share back; others see it at their next demand."""
        if self._actor is not None:
            with contextlib.suppress(RayError, ValueError):
                ray.get(self._actor.leave.remote(self._search), timeout=2)
        self._actor = self._answer = None
