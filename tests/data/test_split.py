"""The stratified split: exact sizes, disjoint, seeded, nested."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from topotune.data import SplitPlan, Splits, TensorPair, stratified_splits
from topotune.data.splits import data_tags, take_stratified
from topotune.errors import ConfigError


def _numbered(labels: Tensor) -> TensorPair:
    """Rows whose input is their own number."""
    return TensorPair(torch.arange(len(labels)), labels)


def _numbers(splits: Splits) -> list[list[int]]:
    return [split.inputs.tolist() for split in (splits.train, splits.val, splits.test)]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
def test_taking_is_exact_and_proportional(counts: list[int], share: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    pool = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    total = round(share * len(labels))
    taken, rest = take_stratified(pool, labels, total)
    assert len(taken) == total
    assert sorted(taken.tolist() + rest.tolist()) == list(range(len(labels)))
    got = torch.bincount(labels[taken], minlength=len(counts)).tolist()
    for count, seats in zip(counts, got, strict=True):
        assert abs(seats - count * total / len(labels)) < 1


def test_rows_stay_with_their_labels_and_splits_are_disjoint() -> None:
    labels = torch.tensor([3, 1, 1, 0] * 25)
    splits = stratified_splits(_numbered(labels), SplitPlan(0.2, 0.1))
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [70, 20, 10]
    assert sorted(n for split in _numbers(splits) for n in split) == list(range(100))
    for split in (splits.train, splits.val, splits.test):
        assert torch.equal(split.targets, labels[split.inputs])
    assert torch.bincount(splits.val.targets).tolist() == [5, 10, 0, 5]


def test_rows_come_in_random_order() -> None:
    labels = torch.repeat_interleave(torch.arange(2), 50)
    train = stratified_splits(_numbered(labels), SplitPlan()).train
    assert set(train.targets[:10].tolist()) == {0, 1}


def test_the_seed_decides_and_the_global_generator_does_not() -> None:
    rows = _numbered(torch.arange(60) % 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = _numbers(stratified_splits(rows, SplitPlan(seed=5)))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert _numbers(stratified_splits(rows, SplitPlan(seed=5))) == first
    assert _numbers(stratified_splits(rows, SplitPlan(seed=6))) != first


def test_the_test_rows_do_not_depend_on_the_other_options() -> None:
    rows = _numbered(torch.arange(200) % 4)
    full = _numbers(stratified_splits(rows, SplitPlan(0.2, 0.25)))
    other = _numbers(stratified_splits(rows, SplitPlan(0.4, 0.25)))
    fewer = _numbers(stratified_splits(rows, SplitPlan(0.2, 0.25, train_examples=20)))
    assert other[2] == full[2]
    assert fewer[1:] == full[1:]
    assert len(fewer[0]) == 20
    assert set(fewer[0]) < set(full[0])


def test_an_official_test_set_is_kept() -> None:
    test = TensorPair(torch.tensor([100, 101]), torch.tensor([0, 1]))
    splits = stratified_splits(_numbered(torch.arange(40) % 2), SplitPlan(0.25, None), test)
    assert splits.test is test
    assert [len(splits.train), len(splits.val)] == [30, 10]


def test_an_official_test_set_excludes_a_fraction() -> None:
    rows = _numbered(torch.arange(40) % 2)
    with pytest.raises(ValueError, match="not both"):
        stratified_splits(rows, SplitPlan(0.2, 0.2), rows)
    with pytest.raises(ValueError, match="not both"):
        stratified_splits(rows, SplitPlan(0.2, None))


@pytest.mark.parametrize(
    ("options", "place", "words"),
    [
        ({"val_fraction": 0}, "val_fraction", "got 0"),
        ({"val_fraction": 1.0}, "val_fraction", "got 1.0"),
        ({"val_fraction": float("nan")}, "val_fraction", "nan"),
        ({"test_fraction": "a"}, "test_fraction", "'a'"),
        ({"test_fraction": True}, "test_fraction", "True"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "val_fraction", "0.5 + 0.5"),
        ({"train_examples": 0}, "train_examples", "at least 1 (got 0)"),
        ({"train_examples": 2.5}, "train_examples", "whole number"),
    ],
)
def test_bad_plans(options: dict[str, float], place: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SplitPlan(**options)  # type: ignore[arg-type]
    assert caught.value.place == f"task.options.{place}"
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("plan", "n", "words"),
    [
        (SplitPlan(train_examples=61), 100, "must not exceed the 60 training rows (got 61)"),
        (SplitPlan(0.001, 0.2), 100, "val_fraction: the val split of 100 rows is empty"),
        (SplitPlan(0.2, 0.001), 100, "test_fraction: the test split of 100 rows is empty"),
        (SplitPlan(0.49, 0.49), 2, "the train split of 2 rows is empty"),
        (SplitPlan(), 0, "rows is empty"),
    ],
)
def test_plans_that_the_data_cannot_fill(plan: SplitPlan, n: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stratified_splits(_numbered(torch.zeros(n, dtype=torch.long)), plan)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(4, 2, dtype=torch.complex64).conj(),
        torch.view_as_complex(torch.zeros(4, 2)).conj().imag,
        torch.eye(4).to_sparse(),
        torch.zeros(1).expand(4),
        torch.zeros(4, 0),
        torch.zeros(4, 3, requires_grad=True).bfloat16(),
    ],
)
def test_tensors_of_any_layout_have_a_digest(inputs: Tensor) -> None:
    rows = TensorPair(inputs, torch.zeros(4))
    tags = data_tags(rows, rows)
    assert tags["data.rows"] == "4 train, 4 validation"
    assert tags != data_tags(rows, TensorPair(inputs, torch.ones(4)))
