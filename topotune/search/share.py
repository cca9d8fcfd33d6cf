"""How searches on one cluster share it: by weighted dominant-resource fairness.

Every search has a demand: what one trial of it needs, how many it could run at once, and its
priority.
Trials are given out one by one, always to the search whose largest share of any resource would,
with that trial and divided by its priority, be the smallest (progressive filling; Ghodsi et al.,
NSDI 2011, "Dominant Resource Fairness"). What one search cannot use goes to the others, and
priority 2 gets twice the trials of priority 1. Where there are more searches than trials at once,
those of equal demand take turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TURN_SECONDS = 600.0
"""How long a search keeps its turn where there are more searches than trials at once."""


@dataclass(frozen=True)
class Demand:
    """What a search asks of a cluster.

    Attributes:
        search: its unique id.
        name: for a person.
        priority: its weight, from 1 on.
        needs: resource to amount of one trial; something above 0.
        wanted: trials that it could run at once now.
        held: trials that hold their resources now.
    """

    search: str
    name: str
    priority: int
    needs: Mapping[str, float]
    wanted: int
    held: int


@dataclass(frozen=True)
class Share:
    """What a search may have.

    Attributes:
        slots: trials at once.
        contested: another search has less than its share, and waits.
        others: names of the searches beside it.
    """

    slots: int
    contested: bool
    others: tuple[str, ...]


def fair_slots(demands: Sequence[Demand], capacity: Mapping[str, float]) -> dict[str, int]:
    """Trials at once for each demand, by its id; ties go to the demand that stands first.

    Args:
        demands: of all searches, the oldest first.
        capacity: resource to amount of the whole cluster.
    """
    slots = {demand.search: 0 for demand in demands}
    left = {name: capacity.get(name, 0.0) for demand in demands for name in demand.needs}
    open_demands = [demand for demand in demands if demand.wanted > 0]
    while open_demands:
        demand = min(open_demands, key=lambda one: (slots[one.search] + 1) * _weight(one, capacity))
        if any(left[name] < amount - 1e-9 for name, amount in demand.needs.items()):
            open_demands.remove(demand)
            continue
        for name, amount in demand.needs.items():
            left[name] -= amount
        slots[demand.search] += 1
        if slots[demand.search] >= demand.wanted:
            open_demands.remove(demand)
    return slots


def _weight(demand: Demand, capacity: Mapping[str, float]) -> float:
    """The dominant share of one trial, divided by the priority."""
    shares = [amount / (capacity.get(name) or 1e-9) for name, amount in demand.needs.items()]
    return max(shares) / demand.priority


class Demands:
    """The demands of all searches on a cluster, kept in one process of it.

    A demand that is not repeated within ``expiry`` seconds is dropped: its driver has ended.
    """

    def __init__(self, expiry: float = 20.0) -> None:
        self._expiry = expiry
        self._demands: dict[str, tuple[float, Demand]] = {}

    def register(self, demand: Demand, capacity: Mapping[str, float], now: float) -> Share:
        """Note a demand; its share of a cluster of this capacity."""
        self._demands[demand.search] = (now, demand)  # a repeated one keeps its place in the order
        self._demands = {
            search: (at, one)
            for search, (at, one) in self._demands.items()
            if now - at < self._expiry
        }
        demands = [one for _, one in self._demands.values()]
        slots = fair_slots(demands, capacity)
        if any(slots[one.search] == 0 < one.wanted for one in demands):
            # More searches than trials at once: they take turns.
            turn = int(now // TURN_SECONDS) % len(demands)
            slots = fair_slots([*demands[turn:], *demands[:turn]], capacity)
        others = [one for one in demands if one.search != demand.search]
        starved = any(one.held < slots[one.search] for one in others)
        return Share(slots[demand.search], starved, tuple(one.name for one in others))

    def leave(self, search: str) -> None:
        """Drop a demand at once."""
        self._demands.pop(search, None)
