"""The one type in which every data set arrives: three disjoint splits, resident on one device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from topotune.records import DATA_TAG, ROWS_TAG


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
