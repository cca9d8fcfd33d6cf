"""1,797 handwritten digits of 8x8 pixels, as the scikit-learn package carries them, or rolled."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from topotune.data.packaged import read_packaged_table
from topotune.data.splits import TensorPair


def load_digits() -> TensorPair:
    """All rows: uint8 images (1797, 1, 8, 8) with values 0 to 16, and labels (1797,) int64.

    The same numbers as ``sklearn.datasets.load_digits()``, in the same order.

    Raises:
        DataUnavailableError: the file is missing or damaged.
    """
    table = torch.from_numpy(
        read_packaged_table("sklearn", "datasets", "data", "digits.csv.gz", columns=65)
    )
    images = table[:, :-1].reshape(-1, 1, 8, 8).contiguous()
    return TensorPair(images, table[:, -1].long())


_HEIGHT = 8
"""Rows of an image, and so the number of different rolls."""

_ROLL_SEED = "digits_rolled:0"
"""Changing it would make another data set; results would no longer compare."""


def digit_rolls(count: int) -> Tensor:
    """By how many rows each of the first ``count`` digits is rolled down, (count,) int64, 0 to 7.

    A hash of a constant and of the row number: the same on every machine, with every version of
    torch, and whatever the split, the trial and the global generators are.
    """
    digests = (hashlib.blake2b(f"{_ROLL_SEED}:{row}".encode()).digest() for row in range(count))
    # A byte has 256 values, which the 8 rolls divide: no roll is more likely than another.
    return torch.tensor([digest[0] % _HEIGHT for digest in digests], dtype=torch.int64)


def load_rolled_digits() -> TensorPair:
    """The digits, the rows of each image cyclically moved down by its :func:`digit_rolls`.

    Row ``i`` of image ``n`` is row ``(i - roll_n) mod 8`` of the original. Shapes, values, labels
    and order are those of :func:`load_digits`.

    Plain digits tell methods apart badly: logistic regression solves them, and so does a trained
    readout on an untrained network. Rolled, a class is no longer a pattern at a fixed place;
    what the hidden layers learn decides.

    Raises:
        DataUnavailableError: the file is missing or damaged.
    """
    plain = load_digits()
    back = torch.arange(_HEIGHT) - digit_rolls(len(plain))[:, None]
    rows = torch.arange(len(plain))[:, None]
    rolled = plain.inputs[rows, 0, back % _HEIGHT].unsqueeze(1).contiguous()
    return TensorPair(rolled, plain.targets)
