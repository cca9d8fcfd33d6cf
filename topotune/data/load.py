"""Data sets by name, each loaded and split once a process."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from topotune.data.packaged import load_digits, load_mnist5k, load_rolled_digits
from topotune.data.splits import SplitPlan, Splits, TensorPair, stratified_splits
from topotune.data.vision import load_vision

PACKAGED: dict[str, Callable[[], TensorPair]] = {
    "digits": load_digits,
    "digits_rolled": load_rolled_digits,
    "mnist5k": load_mnist5k,
}
"""Data sets that an installed package carries; the test rows are carved out."""

OFFICIAL: dict[str, Callable[[str, Path, bool], tuple[TensorPair, TensorPair]]] = {
    "cifar10": load_vision,
    "fashion_mnist": load_vision,
    "kmnist": load_vision,
    "mnist": load_vision,
}
"""Data sets with a test set of their own, downloaded or placed by hand."""


def data_folder(data_dir: str | None) -> Path:
    """The folder of downloaded data sets: ``data_dir``, or else ``$TOPOTUNE_DATA_DIR``, or else
    ``~/.cache/topotune/data``."""
    chosen = data_dir or os.environ.get("TOPOTUNE_DATA_DIR") or "~/.cache/topotune/data"
    return Path(chosen).expanduser().absolute()


def load_splits(name: str, plan: SplitPlan, data_dir: str | None, download: bool) -> Splits:
    """The splits of a data set on the CPU.

    The last two are kept, so that a process that runs many trials reads and splits its data once.
    Callers share the tensors and must not write to them.

    Args:
        name: a key of :data:`PACKAGED` or :data:`OFFICIAL`.
        plan: fractions and seed.
        data_dir: see :func:`data_folder`.
        download: whether to fetch what is missing.

    Raises:
        DataUnavailableError: the data is not there, damaged, or not downloadable.
        ResourceError: the data folder cannot be written.
        ConfigError: the plan leaves a split empty.
    """
    return _load(name, plan, data_folder(data_dir), download)


@lru_cache(maxsize=2)
def _load(name: str, plan: SplitPlan, folder: Path, download: bool) -> Splits:
    if name in PACKAGED:
        return stratified_splits(PACKAGED[name](), plan)
    rows, test = OFFICIAL[name](name, folder, download)
    return stratified_splits(rows, plan, test)
