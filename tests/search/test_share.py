"""Sharing of a cluster: dominant-resource fairness against cases with exact answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topotune.search.share import Claim, Claims, fair_slots


def claim(
    search: str, wanted: int = 100, priority: int = 1, held: int = 0, **needs: float
) -> Claim:
    return Claim(search, f"name-{search}", priority, needs or {"CPU": 1.0}, wanted, held)


@pytest.mark.parametrize(
    ("claims", "capacity", "slots"),
    [
        ([claim("a")], {"CPU": 4}, [4]),
        ([claim("a"), claim("b")], {"CPU": 4}, [2, 2]),
        ([claim("a"), claim("b")], {"CPU": 5}, [3, 2]),
        ([claim("a", priority=3), claim("b")], {"CPU": 8}, [6, 2]),
        ([claim("a", wanted=1), claim("b")], {"CPU": 8}, [1, 7]),
        ([claim("a"), claim("b"), claim("c")], {"CPU": 2}, [1, 1, 0]),
        ([claim("a"), claim("b"), claim("c", priority=100)], {"CPU": 2}, [0, 0, 2]),
        ([claim("a"), claim("b", CPU=4.0)], {"CPU": 8}, [4, 1]),
        ([claim("a", GPU=0.5), claim("b", GPU=1.0)], {"GPU": 4}, [4, 2]),
        ([claim("a", CPU=1.0), claim("b", GPU=1.0)], {"CPU": 4, "GPU": 2}, [4, 2]),
        # The example of the paper: 9 CPUs and 18 GB; (1 CPU, 4 GB) and (3 CPUs, 1 GB).
        (
            [claim("a", CPU=1.0, memory=4.0), claim("b", CPU=3.0, memory=1.0)],
            {"CPU": 9, "memory": 18},
            [3, 2],
        ),
        ([claim("a", GPU=1.0)], {"CPU": 4}, [0]),
        ([claim("a", wanted=0), claim("b")], {"CPU": 2}, [0, 2]),
    ],
)
def test_shares_are_the_known_ones(
    claims: list[Claim], capacity: dict[str, float], slots: list[int]
) -> None:
    found = fair_slots(claims, capacity)
    assert [found[one.search] for one in claims] == slots


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=6
    ),
    st.integers(1, 40),
)
def test_no_more_is_given_than_there_is_and_nothing_lies_idle(
    asked: list[tuple[int, int, int]], cpus: int
) -> None:
    claims = [
        claim(str(number), wanted, priority, CPU=float(need))
        for number, (wanted, priority, need) in enumerate(asked)
    ]
    slots = fair_slots(claims, {"CPU": float(cpus)})
    used = sum(slots[one.search] * one.needs["CPU"] for one in claims)
    assert used <= cpus
    for one in claims:
        assert slots[one.search] <= one.wanted
        assert slots[one.search] == one.wanted or cpus - used < one.needs["CPU"]


def test_a_claim_that_is_not_repeated_is_dropped() -> None:
    claims, capacity = Claims(expiry=10), {"CPU": 4.0}
    assert claims.claim(claim("a"), capacity, now=0).slots == 4
    assert claims.claim(claim("b"), capacity, now=1).slots == 2
    assert claims.claim(claim("a"), capacity, now=9).slots == 2
    alone = claims.claim(claim("a"), capacity, now=11.5)
    assert (alone.slots, alone.others) == (4, ())
    claims.claim(claim("b"), capacity, now=12)
    claims.leave("b")
    assert claims.claim(claim("a"), capacity, now=13).slots == 4


def test_who_has_less_than_its_share_is_seen_by_the_others() -> None:
    claims, capacity = Claims(), {"CPU": 4.0}
    claims.claim(claim("a", held=4), capacity, now=0)
    late = claims.claim(claim("b", held=0), capacity, now=1)
    assert (late.slots, late.contested, late.others) == (2, False, ("name-a",))
    assert claims.claim(claim("a", held=4), capacity, now=2).contested
    claims.claim(replace(claim("b"), held=2), capacity, now=3)
    assert not claims.claim(claim("a", held=2), capacity, now=4).contested


def test_more_searches_than_trials_at_once_take_turns() -> None:
    claims, capacity = Claims(expiry=1e9), {"CPU": 2.0}
    for name in "abc":
        claims.claim(claim(name), capacity, now=0)
    had = {
        name
        for turn in range(3)
        for name in "abc"
        if claims.claim(claim(name), capacity, now=turn * 600.0).slots
    }
    assert had == set("abc")
