"""The image sets of torchvision, downloaded at most once however many workers ask for them."""

from __future__ import annotations

import http.client
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from topotune.data.network import bounded_waits, unreachable
from topotune.data.splits import TensorPair
from topotune.errors import DataUnavailableError, ResourceError
from topotune.requirements import install_command, installed

_CLASSES = {
    "cifar10": "CIFAR10",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "mnist": "MNIST",
}
"""Data set to torchvision class."""


@dataclass(frozen=True)
class _Layout:
    """Where torchvision expects what, relative to the data folder.

    Attributes:
        files: the unpacked files that it reads.
        archives: the files to download or to place by hand, with their MD5.
        urls: one address a mirror, to see whether any answers.
        shape: of one image, channels first.
    """

    files: tuple[str, ...]
    archives: tuple[tuple[str, str], ...]
    urls: tuple[str, ...]
    shape: tuple[int, int, int]


def load_vision(name: str, data_dir: Path, download: bool) -> tuple[TensorPair, TensorPair]:
    """The official training and test rows of a torchvision data set.

    Archives that lie in the folder already are checked against their MD5 and unpacked without the
    network. Files appear under their final name only when complete, so a process that is killed
    leaves nothing that a later one would mistake for data.

    Args:
        name: "mnist", "fashion_mnist", "kmnist" or "cifar10".
        data_dir: folder of all data sets.
        download: whether to fetch what is missing.

    Returns:
        Two pairs of uint8 images (n, channels, side, side) and int64 labels (n,).

    Raises:
        DataUnavailableError: the files are missing and cannot be downloaded, or are damaged.
        ResourceError: the folder cannot be written, or torchvision does not fit torch.
    """
    source = _source(name)
    layout = _layout(name, source)
    if _missing(data_dir, layout):
        packed = all((data_dir / file).is_file() for file, _ in layout.archives)
        if not (download or packed):
            raise _unavailable(name, layout, data_dir, "downloading is off")
        with _locked(data_dir, name):
            # Another worker may have finished while this one waited for the lock.
            if _missing(data_dir, layout):
                _install(name, source, layout, data_dir)
    return (
        _read(name, source, layout, data_dir, train=True),
        _read(name, source, layout, data_dir, train=False),
    )


def _source(name: str) -> Any:
    """torchvision's class of a data set."""
    # Here and not above: importing torchvision costs seconds that most tasks need not pay.
    try:
        from torchvision import datasets
    # Of a torchvision whose compiled part does not load beside this torch, or that is not there.
    except (ImportError, RuntimeError, OSError) as error:
        raise ResourceError(
            f"{name}: {installed('torchvision')} cannot be imported beside {installed('torch')} "
            f"({error}). torchvision is compiled for one release and build of torch: install both "
            f"by one command, from one index: {install_command('torchvision', again=True)}"
        ) from error
    return getattr(datasets, _CLASSES[name])


def _layout(name: str, source: Any) -> _Layout:
    if name == "cifar10":
        folder = source.base_folder
        names = [entry[0] for entry in source.train_list + source.test_list]
        return _Layout(
            files=tuple(f"{folder}/{file}" for file in [*names, source.meta["filename"]]),
            archives=((source.filename, source.tgz_md5),),
            urls=(source.url,),
            shape=(3, 32, 32),
        )
    folder = f"{source.__name__}/raw"
    return _Layout(
        files=tuple(f"{folder}/{Path(file).stem}" for file, _ in source.resources),
        archives=tuple((f"{folder}/{file}", md5) for file, md5 in source.resources),
        urls=tuple(mirror + source.resources[0][0] for mirror in source.mirrors),
        shape=(1, 28, 28),
    )


@contextmanager
def _locked(data_dir: Path, name: str) -> Iterator[None]:
    """Hold the data set's lock across processes; the system frees it when its holder dies."""
    lock = FileLock(data_dir / f".{name}.lock")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise ResourceError(
            f"data folder {data_dir}: cannot be written ({error}). "
            "Set --data-dir or $TOPOTUNE_DATA_DIR to a folder of your own"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _missing(data_dir: Path, layout: _Layout) -> bool:
    return not all((data_dir / file).is_file() for file in layout.files)


def _install(name: str, source: Any, layout: _Layout, data_dir: Path) -> None:
    """Unpack or download into a folder beside, then move the finished files in; lock held."""
    from torchvision.datasets.utils import check_integrity

    staging = data_dir / f".{name}.incoming"
    shutil.rmtree(staging, ignore_errors=True)  # what a killed process left
    placed = [(data_dir / file, md5) for file, md5 in layout.archives if (data_dir / file).exists()]
    for path, md5 in placed:
        if not check_integrity(path, md5):
            raise DataUnavailableError(
                f"{name}: {path} is damaged: its MD5 is not {md5}. Delete it, and place it again "
                "or let it be downloaded"
            )
    fetch = len(placed) < len(layout.archives)
    reason = unreachable(layout.urls) if fetch else ""
    if reason:
        raise _unavailable(name, layout, data_dir, reason)
    try:
        for path, _ in placed:
            target = staging / path.relative_to(data_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        with bounded_waits():
            # Fetches what is not there, checks every MD5, unpacks.
            source(staging, download=True)
        for file in layout.files:
            (data_dir / file).parent.mkdir(parents=True, exist_ok=True)
            (staging / file).replace(data_dir / file)
    except (RuntimeError, OSError, http.client.HTTPException) as error:
        what = "the download" if fetch else "unpacking"
        raise _unavailable(name, layout, data_dir, f"{what} failed: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _unavailable(name: str, layout: _Layout, data_dir: Path, reason: str) -> DataUnavailableError:
    absent = [data_dir / file for file, _ in layout.archives if not (data_dir / file).exists()]
    places = "\n".join(f"  {path}" for path in absent)
    return DataUnavailableError(
        f"{name}: the data set is not in {data_dir} and {reason}. Place these files (as published, "
        f"packed; they are unpacked on first use):\n{places}\n"
        f"from {layout.urls[0].rsplit('/', 1)[0]}/, or set --data-dir or $TOPOTUNE_DATA_DIR to a "
        "folder that has them"
    )


def _read(name: str, source: Any, layout: _Layout, data_dir: Path, train: bool) -> TensorPair:
    """One official split through torchvision's own reader, checked for shape and labels."""
    try:
        read = source(data_dir, train=train, download=False)
        images, labels = torch.as_tensor(read.data), torch.as_tensor(read.targets).long()
        if name == "cifar10":
            images = images.permute(0, 3, 1, 2)
        else:
            images = images.unsqueeze(1)
        _check(images.shape[1:] == layout.shape, f"images of shape {tuple(images.shape[1:])}")
        _check(len(images) == len(labels), f"{len(images)} images and {len(labels)} labels")
        _check(len(labels) > 0 and 0 <= int(labels.min()) <= int(labels.max()) <= 9, "labels")
    # What torchvision and pickle raise on bytes that are not in their format.
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AssertionError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        files = ", ".join(str(data_dir / file) for file in layout.files)
        raise DataUnavailableError(
            f"{name}: a file of the data set is damaged ({type(error).__name__}: {error}). Delete "
            f"these, and place them again or let them be downloaded: {files}"
        ) from error
    return TensorPair(images.contiguous(), labels)


def _check(condition: bool, found: str) -> None:
    if not condition:
        raise ValueError(f"unexpected {found}")
