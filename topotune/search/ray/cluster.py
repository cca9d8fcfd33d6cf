"""What a Ray cluster has, what it may yet get, and why a trial waits for it.

Amounts are mappings from a resource's name in Ray to a number: CPU, GPU, and custom ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from topotune.config.models import SearchConfig

Amounts = Mapping[str, float]
_ROUNDING = 1e-6
"""Ray counts in steps of 1e-4."""
UNLIMITED = 10**6
"""More nodes than any cluster has: a node type without a limit."""


@dataclass(frozen=True)
class Node:
    """A node that is up: what it has, and what is free of it now."""

    total: Amounts
    free: Amounts


@dataclass(frozen=True)
class NodeType:
    """Nodes that an autoscaler may have at once, those that are up included.

    Attributes:
        has: what one of them has.
        most: how many there may be.
        head: the head's own type, of which one node is always there.
    """

    has: Amounts
    most: int
    head: bool = False


def needs_of(config: SearchConfig, gpus: float, alone: bool = False) -> dict[str, float]:
    """What a trial holds of the cluster.

    Args:
        config: the search.
        gpus: GPUs a trial.
        alone: it must share no GPU.
    """
    if alone and gpus > 0:
        gpus = max(gpus, 1.0)
    needs = {"CPU": float(config.resources.cpus), "GPU": gpus, **config.resources.custom}
    return {name: amount for name, amount in needs.items() if amount > 0}


@dataclass(frozen=True)
class Cluster:
    """A snapshot of a cluster.

    Attributes:
        nodes: that are up.
        types: that an autoscaler may have up; empty where no autoscaler is known.
        most_workers: nodes without the head that it may have up, all types together.
        limits: the most that it may have of a resource; none where a name is missing.
    """

    nodes: tuple[Node, ...]
    types: tuple[NodeType, ...] = ()
    most_workers: int = UNLIMITED
    limits: Amounts = field(default_factory=dict)

    def total(self, name: str) -> float:
        """All that the nodes have of a resource."""
        return sum(node.total.get(name, 0.0) for node in self.nodes)

    def free(self, name: str) -> float:
        """What is free of it."""
        return sum(node.free.get(name, 0.0) for node in self.nodes)

    def most(self, name: str) -> float:
        """All that there may be of a resource; infinite where nothing limits an autoscaler."""
        found = self._at_most(lambda has: has.get(name, 0.0))
        return max(min(found, self.limits.get(name, math.inf)), self.total(name))

    def largest(self, name: str) -> float:
        """The most that one node has, or would have, of a resource."""
        return max((has.get(name, 0.0) for has in self._kinds()), default=0.0)

    @property
    def grows(self) -> bool:
        """Whether an autoscaler may add nodes."""
        return bool(self.types)

    def slots(self, needs: Amounts) -> int:
        """Trials at once on the nodes that are up, if no other search uses them."""
        return sum(_slots(node.total, needs) for node in self.nodes)

    def most_slots(self, needs: Amounts) -> int:
        """The same with all nodes that an autoscaler may add."""
        found = self._at_most(lambda has: _slots(has, needs))
        limits = {name: self.limits.get(name, math.inf) for name in needs}
        found = min(found, *(limits[name] / need for name, need in needs.items()), UNLIMITED)
        return max(int(found + _ROUNDING), self.slots(needs))

    def _kinds(self) -> Iterable[Amounts]:
        yield from (node.total for node in self.nodes)
        yield from (kind.has for kind in self.types if kind.most > 0 or kind.head)

    def _at_most(self, of_one: Callable[[Amounts], float]) -> float:
        """The most of something that the autoscaler's numbers of nodes allow."""
        found, left = 0.0, self.most_workers
        for kind in sorted(self.types, key=lambda kind: -of_one(kind.has)):
            one = of_one(kind.has)
            if one <= 0:
                break
            count = min(kind.most, left)
            left -= count
            found += math.inf if count >= UNLIMITED else (count + kind.head) * one
        return found

    def refusal(self, needs: Amounts) -> str:
        """Why no node that is or may be up can hold a trial; empty if one can."""
        if any(_slots(has, needs) for has in self._kinds()):
            return ""
        for name, amount in needs.items():
            if self.largest(name) == 0:
                return (
                    f"a trial needs {amount_of(name, amount)} and no node has any{self._may_grow()}"
                )
        for name, amount in needs.items():
            if self.largest(name) < amount - _ROUNDING:
                return (
                    f"no single node has {amount_of(name, amount)} (the largest has "
                    f"{self.largest(name):g}){self._may_grow()}"
                )
        both = " and ".join(amount_of(name, amount) for name, amount in needs.items())
        return f"no single node has {both}{self._may_grow()}"

    def _may_grow(self) -> str:
        return ", nor would one that the autoscaler may add" if self.grows else ""

    def waits(self, needs: Amounts) -> str:
        """Why a trial cannot start now; empty if a node has room for it.

        Such as "each needs 1 GPU, 0 of 4 free", and what an autoscaler may do about it.
        """
        if any(_slots(node.free, needs) for node in self.nodes):
            return ""
        if refusal := self.refusal(needs):
            return refusal
        short = [
            name for name, amount in needs.items() if self.free(name) < amount - _ROUNDING
        ] or list(needs)
        text = self.short({name: needs[name] for name in short})
        if not self.slots(needs):
            text += "; no node that is up is large enough"
        elif all(self.free(name) >= needs[name] - _ROUNDING for name in short):
            text += ", on no single node enough"
        more = [
            f"{self._most_in_words(name)} {plural(name, self.most(name))}"
            for name in short
            if self.most(name) > self.total(name)
        ]
        if more:
            text += f"; the autoscaler may add nodes: up to {' and '.join(more)}"
        elif self.grows:
            text += "; the autoscaler may add no more"
        return text

    def short(self, needs: Amounts) -> str:
        """What a trial needs of some resources, and what is free of them."""
        return "each needs " + " and ".join(
            f"{amount_of(name, amount)}, {self.free(name):g} of {self.total(name):g} free"
            for name, amount in needs.items()
        )

    def _most_in_words(self, name: str) -> str:
        most = self.most(name)
        return "any number of" if math.isinf(most) else f"{most:g}"


def _slots(has: Amounts, needs: Amounts) -> int:
    """Trials that fit on one node with so much."""
    return min((_fit(has.get(name, 0.0), name, need) for name, need in needs.items()), default=0)


def _fit(has: float, name: str, need: float) -> int:
    if name == "GPU" and need < 1:
        # Ray places a fraction within one device. What is free of several may be parts of each.
        return int(has + _ROUNDING) * int(1 / need + _ROUNDING) + int(
            (has % 1 + _ROUNDING) / need if has % 1 < 1 - _ROUNDING else 0
        )
    return int(has / need + _ROUNDING)


def amount_of(name: str, amount: float) -> str:
    """An amount in words, such as "1 GPU"."""
    return f"{amount:g} {plural(name, amount)}"


def plural(name: str, amount: float) -> str:
    """A resource's name as it follows a number; a custom one stays as it is."""
    return f"{name}s" if name in ("CPU", "GPU") and amount != 1 else name
