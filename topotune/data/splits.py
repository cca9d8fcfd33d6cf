"""The form in which every data set arrives: three disjoint splits, resident on one device; and how
stratified, seeded ones are carved out of labelled rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from topotune.errors import ConfigError
from topotune.records import DATA_TAG, ROWS_TAG

_PLACE = "task.options"


@dataclass(frozen=True)
class TensorPair:
    """Inputs and targets of one split, row ``i`` of both belonging together.

    Attributes:
        inputs: (n, ...) on the training device; raw, the task normalises batches.
        targets: (n, ...) on the same device.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"inputs and targets differ in length: {len(self.inputs)} and {len(self.targets)}"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def at(self, index: Tensor) -> TensorPair:
        """The rows at ``index`` (a 1-d integer tensor on the same device)."""
        return TensorPair(self.inputs[index], self.targets[index])

    def rows(self, start: int, stop: int) -> TensorPair:
        """The rows ``start`` to ``stop``, as views."""
        return TensorPair(self.inputs[start:stop], self.targets[start:stop])

    def to(self, device: torch.device) -> TensorPair:
        """The same rows on ``device``."""
        return TensorPair(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Splits:
    """Disjoint train, validation and test rows. A search sees ``train`` and ``val`` only."""

    train: TensorPair
    val: TensorPair
    test: TensorPair

    def to(self, device: torch.device) -> Splits:
        """All three on ``device``."""
        return Splits(self.train.to(device), self.val.to(device), self.test.to(device))


def data_tags(train: TensorPair, val: TensorPair) -> dict[str, str]:
    """Tags that say which data these are: a digest of every value and its place, and the sizes."""
    digest = hashlib.sha256()
    for rows in (train, val):
        for tensor in (rows.inputs, rows.targets):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            plain = tensor.detach().to_dense().cpu().resolve_conj().resolve_neg().contiguous()
            digest.update(plain.view(torch.uint8).numpy().data)
    sizes = f"{len(train)} train, {len(val)} validation"
    return {DATA_TAG: digest.hexdigest()[:16], ROWS_TAG: sizes}


@dataclass(frozen=True)
class SplitPlan:
    """How much of the data goes where.

    The test rows depend on ``seed`` and ``test_fraction`` only, the validation rows not on
    ``train_examples``: a cheap search on a part of the training rows is judged on the same
    examples as a full one.

    Attributes:
        val_fraction: share of the rows for validation.
        test_fraction: share of the rows for the test; None if the data set brings its own test.
        train_examples: keep only so many training rows, stratified; None keeps all.
        seed: seed of the split.

    Raises:
        ConfigError: a fraction is outside (0, 1), both together leave nothing to train on, or
            ``train_examples`` is not a whole number of at least 1.
    """

    val_fraction: float = 0.2
    test_fraction: float | None = 0.2
    train_examples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_fraction("val_fraction", self.val_fraction)
        if self.test_fraction is not None:
            _check_fraction("test_fraction", self.test_fraction)
            both = self.val_fraction + self.test_fraction
            if both >= 1:
                raise ConfigError(
                    f"{_PLACE}.val_fraction",
                    "val_fraction and test_fraction together must stay below 1 to leave training "
                    f"rows (got {self.val_fraction} + {self.test_fraction})",
                )
        count = self.train_examples
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise ConfigError(
                f"{_PLACE}.train_examples", f"must be a whole number or null (got {count!r})"
            )
        if count is not None and count < 1:
            raise ConfigError(f"{_PLACE}.train_examples", f"must be at least 1 (got {count})")


def _check_fraction(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ConfigError(
            f"{_PLACE}.{name}", f"must be a number strictly between 0 and 1 (got {value!r})"
        )


def stratified_splits(rows: TensorPair, plan: SplitPlan, test: TensorPair | None = None) -> Splits:
    """Train, validation and test splits in which every class keeps its share.

    Args:
        rows: inputs (n, ...) and class labels (n,), integers, on the CPU.
        plan: the fractions and the seed.
        test: an official test set, taken as it is; ``plan.test_fraction`` must then be None.

    Returns:
        Copies of the rows, each split in random order. The sizes are the rounded fractions of n.

    Raises:
        ConfigError: a split would be empty, or ``train_examples`` exceeds the training rows.
    """
    if (test is None) == (plan.test_fraction is None):
        raise ValueError("give either an official test set or a test_fraction, and not both")
    labels, n = rows.targets, len(rows)
    # A generator of its own: the split must not depend on, nor disturb, the global one.
    rest = torch.randperm(n, generator=torch.Generator().manual_seed(plan.seed))
    if plan.test_fraction is not None:
        taken, rest = take_stratified(rest, labels, round(plan.test_fraction * n))
        test = rows.at(taken)
    assert test is not None
    val, rest = take_stratified(rest, labels, round(plan.val_fraction * n))
    if plan.train_examples is not None:
        if plan.train_examples > len(rest):
            raise ConfigError(
                f"{_PLACE}.train_examples",
                f"must not exceed the {len(rest)} training rows (got {plan.train_examples})",
            )
        rest, _ = take_stratified(rest, labels, plan.train_examples)
    for name, size in {"test": len(test), "val": len(val), "train": len(rest)}.items():
        if size == 0:
            raise ConfigError(
                f"{_PLACE}.{'test' if name == 'test' else 'val'}_fraction",
                f"the {name} split of {n} rows is empty",
                "Use more rows or other fractions",
            )
    return Splits(train=rows.at(rest), val=rows.at(val), test=test)


def take_stratified(pool: Tensor, labels: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Take ``total`` rows out of a pool, each class in proportion, and the rows that are left.

    Seats are given by largest remainders, so that the total is exact; of each class the rows that
    come first in the pool are taken, and both results keep the pool's order.

    Args:
        pool: (m,) row numbers in random order.
        labels: (n,) class of every row.
        total: rows to take, at most m.

    Returns:
        Two tensors of row numbers, of lengths ``total`` and ``m - total``.
    """
    if total == 0:
        return pool[:0], pool
    _, classes, counts = torch.unique(labels[pool], return_inverse=True, return_counts=True)
    seats = counts * total // len(pool)
    remainders = counts * total - seats * len(pool)
    missing = total - int(seats.sum())
    seats[torch.argsort(remainders, descending=True, stable=True)[:missing]] += 1
    # The rank of a row among the rows of its class, in the pool's order.
    by_class = torch.argsort(classes, stable=True)
    starts = torch.cumsum(counts, 0) - counts
    rank = torch.empty_like(pool)
    rank[by_class] = torch.arange(len(pool)) - starts[classes[by_class]]
    chosen = rank < seats[classes]
    return pool[chosen], pool[~chosen]
