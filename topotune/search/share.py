"""How searches on one cluster share it: by weighted dominant-resource fairness.

Every search has a claim: what one trial of it needs, how many it could run at once, and a priority.
Trials are given out one by one, always to the search whose largest share of any resource would,
with that trial and divided by its priority, be the smallest (progressive filling; Ghodsi et al.,
NSDI 2011, "Dominant Resource Fairness"). What one search cannot use goes to the others, and
priority 2 gets twice the trials of priority 1. Where there are more searches than trials at once,
those of equal claim take turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TURN_SECONDS = 600.0
"""How long a search keeps its turn where there are more searches than trials at once."""


@dataclass(frozen=True)
class Claim:
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


def fair_slots(claims: Sequence[Claim], capacity: Mapping[str, float]) -> dict[str, int]:
    """Trials at once for each claim, by its id; ties go to the claim that stands first.

    Args:
        claims: of all searches, the oldest first.
        capacity: resource to amount of the whole cluster.
    """
    slots = {claim.search: 0 for claim in claims}
    left = {name: capacity.get(name, 0.0) for claim in claims for name in claim.needs}
    open_claims = [claim for claim in claims if claim.wanted > 0]
    while open_claims:
        claim = min(open_claims, key=lambda one: (slots[one.search] + 1) * _weight(one, capacity))
        if any(left[name] < amount - 1e-9 for name, amount in claim.needs.items()):
            open_claims.remove(claim)
            continue
        for name, amount in claim.needs.items():
            left[name] -= amount
        slots[claim.search] += 1
        if slots[claim.search] >= claim.wanted:
            open_claims.remove(claim)
    return slots


def _weight(claim: Claim, capacity: Mapping[str, float]) -> float:
    """The dominant share of one trial, divided by the priority."""
    shares = [amount / (capacity.get(name) or 1e-9) for name, amount in claim.needs.items()]
    return max(shares) / claim.priority


class Claims:
    """The claims of all searches on a cluster, kept in one process of it.

    A claim that is not repeated within ``expiry`` seconds is dropped: its driver has ended or died.
    """

    def __init__(self, expiry: float = 20.0) -> None:
        self._expiry = expiry
        self._claims: dict[str, tuple[float, Claim]] = {}

    def claim(self, claim: Claim, capacity: Mapping[str, float], now: float) -> Share:
        """Take a claim down; its share of a cluster of this capacity."""
        self._claims[claim.search] = (now, claim)  # a repeated one keeps its place in the order
        self._claims = {
            search: (at, one)
            for search, (at, one) in self._claims.items()
            if now - at < self._expiry
        }
        claims = [one for _, one in self._claims.values()]
        slots = fair_slots(claims, capacity)
        if any(slots[one.search] == 0 < one.wanted for one in claims):
            # More searches than trials at once: they take turns.
            turn = int(now // TURN_SECONDS) % len(claims)
            slots = fair_slots([*claims[turn:], *claims[:turn]], capacity)
        others = [one for one in claims if one.search != claim.search]
        starved = any(one.held < slots[one.search] for one in others)
        return Share(slots[claim.search], starved, tuple(one.name for one in others))

    def leave(self, search: str) -> None:
        """Drop a claim at once."""
        self._claims.pop(search, None)
