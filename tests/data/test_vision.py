"""torchvision's sets, through its own readers, on small files in the true formats."""

from __future__ import annotations

import gc
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from tests.vision_cases import (
    TEST,
    TRAIN,
    Files,
    Mirror,
    cifar_archive,
    cifar_batches,
    closed_port,
    idx_bytes,
    md5_of,
    mnist_archives,
    place_files,
    random_images,
)
from topotune.data import load_splits
from topotune.data import vision as vision_module
from topotune.data.network import bounded_waits, unreachable
from topotune.data.splits import SplitPlan
from topotune.data.vision import load_vision
from topotune.errors import DataUnavailableError, ResourceError
from topotune.tasks import DataOptions, build_task


@pytest.fixture
def mnist_files(monkeypatch: pytest.MonkeyPatch) -> Files:
    """Small files whose MD5 torchvision then expects, and no mirror that could answer."""
    files = mnist_archives()
    monkeypatch.setattr(datasets.MNIST, "resources", [(n, md5_of(d)) for n, d in files.items()])
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{closed_port()}/"])
    return files


@pytest.fixture
def cifar_members(monkeypatch: pytest.MonkeyPatch) -> Files:
    members = cifar_batches()
    sums = {name: md5_of(data) for name, data in members.items()}
    batches = [[f"data_batch_{k}", sums[f"data_batch_{k}"]] for k in range(1, 6)]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", batches)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5_of(cifar_archive(members)))
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{closed_port()}/c.tar.gz")
    return members


@pytest.fixture
def mirror(mnist_files: Files, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    server = Mirror(mnist_files)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [server.url])
    yield server
    server.close()


@pytest.mark.parametrize("unpack", [True, False])
@pytest.mark.parametrize("download", [True, False])
def test_placed_mnist_files_need_no_network(
    tmp_path: Path, mnist_files: Files, unpack: bool, download: bool
) -> None:
    place_files(tmp_path / "MNIST/raw", mnist_files, unpack)
    train, test = load_vision("mnist", tmp_path, download)
    assert train.inputs.dtype == torch.uint8
    assert torch.equal(train.inputs, torch.from_numpy(random_images(TRAIN, 28, 28))[:, None])
    assert torch.equal(test.inputs, torch.from_numpy(random_images(TEST, 28, 28))[:, None])
    assert train.targets.tolist() == [i % 10 for i in range(TRAIN)]
    assert test.targets.dtype == torch.int64
    assert not (tmp_path / ".mnist.incoming").exists()


@pytest.mark.parametrize(
    ("name", "folder", "source"),
    [
        ("kmnist", "KMNIST", datasets.KMNIST),
        ("fashion_mnist", "FashionMNIST", datasets.FashionMNIST),
    ],
)
def test_the_relatives_of_mnist_have_their_own_folders(
    tmp_path: Path,
    name: str,
    folder: str,
    source: type[datasets.MNIST],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = mnist_archives()
    monkeypatch.setattr(source, "resources", [(n, md5_of(d)) for n, d in files.items()])
    place_files(tmp_path / folder / "raw", files)
    train, _ = load_vision(name, tmp_path, download=False)
    assert train.inputs.shape == (TRAIN, 1, 28, 28)


@pytest.mark.parametrize("packed", [True, False])
def test_placed_cifar_files(tmp_path: Path, cifar_members: Files, packed: bool) -> None:
    if packed:
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(cifar_archive(cifar_members))
    else:
        place_files(tmp_path / "cifar-10-batches-py", cifar_members)
    train, test = load_vision("cifar10", tmp_path, download=False)
    assert train.inputs.shape == (TRAIN, 3, 32, 32)
    assert train.inputs.is_contiguous()
    first = pickle.loads(cifar_members["data_batch_1"])
    expected = torch.from_numpy(first["data"][0]).reshape(3, 32, 32)
    assert torch.equal(train.inputs[0], expected)
    assert train.targets[: len(first["labels"])].tolist() == first["labels"]
    assert len(test) == TEST


def test_validation_is_carved_out_of_the_official_training_rows(
    tmp_path: Path, mnist_files: Files
) -> None:
    place_files(tmp_path / "MNIST/raw", mnist_files)
    task = build_task("mnist", {"val_fraction": 0.25})
    splits = task.splits(DataOptions(str(tmp_path), download=False))
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [30, 10, 20]
    assert torch.bincount(splits.val.targets).tolist() == [1] * 10
    assert splits.test.targets.tolist() == [i % 10 for i in range(TEST)]


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("mnist", ["MNIST/raw/train-images-idx3-ubyte.gz", "MNIST/raw/t10k-labels-idx1-ubyte.gz"]),
        ("kmnist", ["KMNIST/raw/train-images-idx3-ubyte.gz"]),
        ("fashion_mnist", ["FashionMNIST/raw/t10k-images-idx3-ubyte.gz"]),
        ("cifar10", ["cifar-10-python.tar.gz"]),
    ],
)
def test_absent_data_says_what_to_place_where(tmp_path: Path, name: str, listed: list[str]) -> None:
    with pytest.raises(DataUnavailableError) as caught:
        load_splits(name, SplitPlan(0.1, None), str(tmp_path), download=False)
    assert list(tmp_path.iterdir()) == []
    message = str(caught.value)
    assert message.startswith(f"{name}: the data set is not in {tmp_path} and downloading is off")
    for file in listed:
        assert f"\n  {tmp_path / file}\n" in message
    assert "--data-dir" in message
    assert "$TOPOTUNE_DATA_DIR" in message


def test_only_what_is_missing_is_listed(tmp_path: Path, mnist_files: Files) -> None:
    absent = "t10k-labels-idx1-ubyte.gz"
    place_files(tmp_path / "MNIST/raw", {n: d for n, d in mnist_files.items() if n != absent})
    with pytest.raises(DataUnavailableError) as caught:
        load_vision("mnist", tmp_path, download=False)
    assert absent in str(caught.value)
    assert "train-images" not in str(caught.value)


def test_offline_says_so_and_leaves_nothing(tmp_path: Path, mnist_files: Files) -> None:
    with pytest.raises(DataUnavailableError, match=r"does not answer .*refused"):
        load_vision("mnist", tmp_path, download=True)
    assert [p.name for p in tmp_path.iterdir() if p.name != ".mnist.lock"] == []


def test_concurrent_workers_download_once(tmp_path: Path, mirror: Mirror) -> None:
    shapes: list[torch.Size] = []

    def worker() -> None:
        shapes.append(load_vision("mnist", tmp_path, download=True)[0].inputs.shape)

    workers = [threading.Thread(target=worker) for _ in range(4)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert shapes == [torch.Size([TRAIN, 1, 28, 28])] * 4
    assert mirror.fetched == {name: 1 for name, _ in datasets.MNIST.resources}


def test_a_download_fetches_only_what_is_not_placed(
    tmp_path: Path, mirror: Mirror, mnist_files: Files
) -> None:
    placed = "train-images-idx3-ubyte.gz"
    place_files(tmp_path / "MNIST/raw", {placed: mnist_files[placed]})
    load_vision("mnist", tmp_path, download=True)
    assert mirror.fetched[placed] == 0
    assert sum(mirror.fetched.values()) == 3


def test_a_download_with_a_wrong_checksum_is_refused(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = datasets.MNIST.resources[2][0]
    wrong = [(n, "0" * 32 if n == name else md5) for n, md5 in datasets.MNIST.resources]
    monkeypatch.setattr(datasets.MNIST, "resources", wrong)
    with pytest.raises(DataUnavailableError, match="corrupted"):
        load_vision("mnist", tmp_path, download=True)
    assert not list(tmp_path.rglob("*ubyte*"))


def test_what_a_killed_download_left_is_not_taken_for_data(tmp_path: Path, mirror: Mirror) -> None:
    left = tmp_path / ".mnist.incoming/MNIST/raw"
    left.mkdir(parents=True)
    for name, _ in datasets.MNIST.resources:
        (left / name.removesuffix(".gz")).write_bytes(b"half")
    train, _ = load_vision("mnist", tmp_path, download=True)
    assert len(train) == TRAIN


def test_a_damaged_archive_is_named_and_kept(
    tmp_path: Path, mirror: Mirror, mnist_files: Files
) -> None:
    place_files(tmp_path / "MNIST/raw", mnist_files)
    path = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte.gz"
    path.write_bytes(b"not gzip")
    with pytest.raises(DataUnavailableError, match=r"t10k-images-idx3-ubyte.gz is damaged.*MD5"):
        load_vision("mnist", tmp_path, download=True)
    assert path.read_bytes() == b"not gzip"
    assert not mirror.fetched


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x00\x00\x08\x03\x00\x00",
        idx_bytes(random_images(TRAIN, 28, 28))[:-5],
        idx_bytes(random_images(TRAIN - 1, 28, 28)),
        idx_bytes(random_images(TRAIN, 27, 27)),
        b"not an image file at all",
    ],
)
def test_a_damaged_image_file(tmp_path: Path, mnist_files: Files, damage: bytes) -> None:
    place_files(tmp_path / "MNIST/raw", mnist_files, unpack=True)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(damage)
    with pytest.raises(DataUnavailableError, match=r"mnist: a file of the data set is damaged"):
        load_vision("mnist", tmp_path, download=False)


def test_labels_outside_the_classes_are_refused(tmp_path: Path, mnist_files: Files) -> None:
    place_files(tmp_path / "MNIST/raw", mnist_files, unpack=True)
    (tmp_path / "MNIST/raw/train-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(TRAIN, 10)))
    with pytest.raises(DataUnavailableError, match="labels"):
        load_vision("mnist", tmp_path, download=False)


def test_a_damaged_cifar_batch(tmp_path: Path, cifar_members: Files) -> None:
    place_files(tmp_path / "cifar-10-batches-py", {**cifar_members, "data_batch_3": b"x"})
    with pytest.raises(DataUnavailableError, match=r"damaged.*data_batch_3"):
        load_vision("cifar10", tmp_path, download=False)


def test_a_folder_that_cannot_be_made(tmp_path: Path, mnist_files: Files) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match=r"cannot be written.*--data-dir"):
        load_vision("mnist", tmp_path / "file" / "data", download=True)


def test_complete_data_is_read_without_a_lock(
    tmp_path: Path, mnist_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_files(tmp_path / "MNIST/raw", mnist_files, unpack=True)
    monkeypatch.delattr(vision_module, "FileLock")
    assert len(load_vision("mnist", tmp_path, download=True)[0]) == TRAIN
    assert not (tmp_path / ".mnist.lock").exists()


def test_a_mirror_that_never_answers_costs_a_bounded_time() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        reason = unreachable([url], seconds=0.2)
    assert "no answer within 0.2 s" in reason or "timed out" in reason


def test_one_mirror_that_answers_is_enough(mirror: Mirror) -> None:
    dead = f"http://127.0.0.1:{closed_port()}/"
    assert unreachable([dead, mirror.url + "train-labels-idx1-ubyte.gz"]) == ""
    assert unreachable([mirror.url + "absent"]) == ""


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_mirror_without_the_file_is_quoted(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.MNIST, "mirrors", [mirror.url + "moved/"])
    mirror.files.clear()
    with pytest.raises(DataUnavailableError, match=r"the download failed: (?s:.)*404") as caught:
        load_vision("mnist", tmp_path, download=True)
    # torchvision leaves the refused answer open; collect it here, where the warning is expected.
    del caught
    gc.collect()


def test_waits_are_bounded_only_inside() -> None:
    before = socket.getdefaulttimeout()
    with bounded_waits(12.0):
        assert socket.getdefaulttimeout() == 12.0
    assert socket.getdefaulttimeout() == before
