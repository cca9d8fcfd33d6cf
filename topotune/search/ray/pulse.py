"""What happens about twice a second while trials run: look around, and show how it stands."""

from __future__ import annotations

import math
import time

from topotune.config.models import SearchConfig
from topotune.errors import RunError
from topotune.search.drive.book import Book
from topotune.search.live import LiveFile
from topotune.search.place.shipping import Shipping
from topotune.search.ray.cluster import Cluster, needs_of
from topotune.search.ray.session import RaySession
from topotune.search.ray.sharing import Sharing
from topotune.search.view import Listener

DRAIN_SECONDS = 6.0
"""How long trials may finish their epoch after the first Ctrl-C, before they are cut short. With
what closing takes (records, Ray) the process is gone within 20 seconds."""
TICK_SECONDS = 0.5


class Pulse:
    """Called on every turn of Tune's event loop; acts every ``TICK_SECONDS``.

    Attributes:
        stop_since: monotonic time since which the search drains; infinite while it does not.
    """

    def __init__(
        self,
        book: Book,
        listener: Listener,
        ray_session: RaySession,
        shipping: Shipping,
        config: SearchConfig,
        gpus: float,
        live: LiveFile,
        sharing: Sharing | None = None,
    ) -> None:
        self._sharing = sharing
        self._book, self._listener, self._ray = book, listener, ray_session
        self._shipping, self._config, self._gpus, self._live = shipping, config, gpus, live
        self._next = self._next_look = 0.0
        self._waiting, self._waits_since = "", math.inf
        self.stop_since = math.inf

    def __call__(self) -> None:
        """Look around if it is time."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + TICK_SECONDS
        if (self._book.stopping or self._book.fatal) and self.stop_since == math.inf:
            self.stop_since = now
            if self._book.stopping:
                self._listener.note(
                    f"{self._book.stopping}: trials finish their epoch and are saved; once more "
                    "to abort"
                )
        beside = self._shared()
        phase = "draining" if self.stop_since < math.inf else "running"
        waiting = "; ".join(filter(None, (self._why(now), beside)))
        view = self._book.view(phase, waiting, self._shipping.line())
        self._listener.tick(view)
        self._live.show(view)

    def _shared(self) -> str:
        """Take a changed share of the cluster over; whom it is shared with, in words."""
        if self._sharing is None:
            return ""
        self._sharing.tick()
        share = self._sharing.share
        if share is None:
            return ""
        self._book.shared = bool(share.others)
        self._book.concurrency, self._book.contested = share.slots, share.contested
        if not share.others:
            return ""
        return f"shares the cluster with {', '.join(share.others)}: {share.slots} at once"

    def overdue(self, grace: float = 0.0) -> bool:
        """Whether trials must end now: draining took too long, or nothing can end by itself.

        Args:
            grace: seconds to wait longer than that.
        """
        if (self._book.stopping or self._book.fatal) and not self._book.holding:
            return True  # none trains: those that wait for a worker need not get it
        patience = 0.0 if self._book.fatal else DRAIN_SECONDS
        return time.monotonic() - self.stop_since > patience + grace

    def _why(self, now: float) -> str:
        """Why a handed-out trial holds no device yet; empty while none waits."""
        pending = len(self._book.live) - len(self._book.holding)
        if pending <= 0:
            self._waits_since, self._waiting = math.inf, ""
            return ""
        self._waits_since = min(self._waits_since, now)
        if now - self._waits_since < 3:
            return ""
        if now >= self._next_look:
            self._next_look = now + 5
            cluster = self._ray.cluster()
            if self._ray.local and not cluster.total("CPU"):
                # No node is ever added to a cluster of our own: waiting would last for ever.
                self._book.fatal = self._book.fatal or RunError(
                    "Ray's local node has died (killed, or out of memory). What is finished is "
                    f"kept; 'topotune resume {self._config.name}' continues"
                )
            self._waiting = self._in_words(pending, cluster)
        return self._waiting

    def _in_words(self, pending: int, cluster: Cluster) -> str:
        unplaced = min(self._book.unplaced, pending)
        if not unplaced:
            return f"{pending} starting: a worker process loads its libraries"
        alone = self._book.waits_alone
        needs = needs_of(self._config, self._gpus, alone)
        why = cluster.waits(needs) or f"{cluster.short(needs)}, and Ray has not placed it yet"
        if alone and self._gpus:
            why += "; one ran out of GPU memory and waits for a whole GPU"
        return f"{unplaced} waiting: {why}"
