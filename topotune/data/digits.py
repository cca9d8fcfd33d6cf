"""1,797 handwritten digits of 8x8 pixels, as the scikit-learn package carries them."""

from __future__ import annotations

import torch

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
