"""The driver's side of sharing a cluster: sends its claim every few seconds and receives its share.

The claims of all searches lie in one Ray actor of a known name, which the driver that is first
makes. It goes with that driver; the next one to speak makes another, and within seconds all claims
are there again. Until then each search keeps its share.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from topotune.search.share import Claim, Claims, Share

NAME, NAMESPACE = "topotune-claims", "topotune"
CLAIM_SECONDS = 2.0
_LATE_SECONDS = 15.0


class ClaimsActor:
    """:class:`~topotune.search.share.Claims` in a process of the cluster."""

    def __init__(self) -> None:
        self._claims = Claims()

    def claim(self, claim: Claim, capacity: Mapping[str, float]) -> Share:
        """As :meth:`Claims.claim`, by this process's clock."""
        return self._claims.claim(claim, capacity, time.monotonic())

    def leave(self, search: str) -> None:
        """As :meth:`Claims.leave`."""
        self._claims.leave(search)


class Sharing:
    """A search's part in the sharing; waits for no answer.

    Args:
        search: its unique id.
        claim: its present claim.
        capacity: resource to amount of the whole cluster, as it is now.
    """

    def __init__(
        self, search: str, claim: Callable[[], Claim], capacity: Callable[[], dict[str, float]]
    ) -> None:
        self._search, self._claim, self._capacity = search, claim, capacity
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
            if self._answer is None and now - self._asked >= CLAIM_SECONDS:
                self._asked = now
                if self._actor is None:
                    self._actor = (
                        ray.remote(ClaimsActor)
                        .options(name=NAME, namespace=NAMESPACE, get_if_exists=True, num_cpus=0)
                        .remote()
                    )
                self._answer = self._actor.claim.remote(self._claim(), self._capacity())
        except (RayError, ValueError):  # its driver ended, or two made it at the same moment
            self._actor = self._answer = None

    def wait(self, seconds: float) -> None:
        """Wait for a first answer, at most so long."""
        end = time.monotonic() + seconds
        while self.share is None and time.monotonic() < end:
            self.tick()
            time.sleep(0.05)

    def close(self) -> None:
        """Give the share back; others see it at their next claim."""
        if self._actor is not None:
            with contextlib.suppress(RayError, ValueError):
                ray.get(self._actor.leave.remote(self._search), timeout=2)
        self._actor = self._answer = None
