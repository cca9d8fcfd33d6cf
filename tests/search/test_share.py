"""Sharing of a cluster: dominant-resource fairness against cases with exact answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topotune.search.share import Demand, Demands, fair_slots


def demand(
    search: str, wanted: int = 100, priority: int = 1, held: int = 0, **needs: float
) -> Demand:
    return Demand(search, f"name-{search}", priority, needs or {"CPU": 1.0}, wanted, held)


@pytest.mark.parametrize(
    ("demands", "capacity", "slots"),
    [
        ([demand("a")], {"CPU": 4}, [4]),
        ([demand("a"), demand("b")], {"CPU": 4}, [2, 2]),
        ([demand("a"), demand("b")], {"CPU": 5}, [3, 2]),
        ([demand("a", priority=3), demand("b")], {"CPU": 8}, [6, 2]),
        ([demand("a", wanted=1), demand("b")], {"CPU": 8}, [1, 7]),
        ([demand("a"), demand("b"), demand("c")], {"CPU": 2}, [1, 1, 0]),
        ([demand("a"), demand("b"), demand("c", priority=100)], {"CPU": 2}, [0, 0, 2]),
        ([demand("a"), demand("b", CPU=4.0)], {"CPU": 8}, [4, 1]),
        ([demand("a", GPU=0.5), demand("b", GPU=1.0)], {"GPU": 4}, [4, 2]),
        ([demand("a", CPU=1.0), demand("b", GPU=1.0)], {"CPU": 4, "GPU": 2}, [4, 2]),
        # The example of the paper: 9 CPUs and 18 GB; (1 CPU, 4 GB) and (3 CPUs, 1 GB).
        (
            [demand("a", CPU=1.0, memory=4.0), demand("b", CPU=3.0, memory=1.0)],
            {"CPU": 9, "memory": 18},
            [3, 2],
        ),
        ([demand("a", GPU=1.0)], {"CPU": 4}, [0]),
        ([demand("a", wanted=0), demand("b")], {"CPU": 2}, [0, 2]),
    ],
)
def test_shares_are_the_known_ones(
    demands: list[Demand], capacity: dict[str, float], slots: list[int]
) -> None:
    found = fair_slots(demands, capacity)
    assert [found[one.search] for one in demands] == slots


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=6
    ),
    st.integers(1, 40),
)
def test_no_more_is_given_than_there_is_and_nothing_lies_idle(
    asked: list[tuple[int, int, int]], cpus: int
) -> None:
    demands = [
        demand(str(number), wanted, priority, CPU=float(need))
        for number, (wanted, priority, need) in enumerate(asked)
    ]
    slots = fair_slots(demands, {"CPU": float(cpus)})
    used = sum(slots[one.search] * one.needs["CPU"] for one in demands)
    assert used <= cpus
    for one in demands:
        assert slots[one.search] <= one.wanted
        assert slots[one.search] == one.wanted or cpus - used < one.needs["CPU"]


def test_a_demand_that_is_not_repeated_is_dropped() -> None:
    demands, capacity = Demands(expiry=10), {"CPU": 4.0}
    assert demands.register(demand("a"), capacity, now=0).slots == 4
    assert demands.register(demand("b"), capacity, now=1).slots == 2
    assert demands.register(demand("a"), capacity, now=9).slots == 2
    alone = demands.register(demand("a"), capacity, now=11.5)
    assert (alone.slots, alone.others) == (4, ())
    demands.register(demand("b"), capacity, now=12)
    demands.leave("b")
    assert demands.register(demand("a"), capacity, now=13).slots == 4


def test_who_has_less_than_its_share_is_seen_by_the_others() -> None:
    demands, capacity = Demands(), {"CPU": 4.0}
    demands.register(demand("a", held=4), capacity, now=0)
    late = demands.register(demand("b", held=0), capacity, now=1)
    assert (late.slots, late.contested, late.others) == (2, False, ("name-a",))
    assert demands.register(demand("a", held=4), capacity, now=2).contested
    demands.register(replace(demand("b"), held=2), capacity, now=3)
    assert not demands.register(demand("a", held=2), capacity, now=4).contested


def test_more_searches_than_trials_at_once_take_turns() -> None:
    demands, capacity = Demands(expiry=1e9), {"CPU": 2.0}
    for name in "abc":
        demands.register(demand(name), capacity, now=0)
    had = {
        name
        for turn in range(3)
        for name in "abc"
        if demands.register(demand(name), capacity, now=turn * 600.0).slots
    }
    assert had == set("abc")
