"""Code and places of others that fail are named with their line, and none is run unasked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from topotune.errors import ConfigError, PluginError, in_one_line
from topotune.plugins import load_object
from topotune.records import TrialSpec
from topotune.search.ray.session import _fix_relative_paths
from topotune.train.assemble import check_buildable, check_spec

ROOT = str(Path(__file__).parent.parent)

TASKS = """
from tests.user_task import Rings
class Three(Rings):
    def model(self, name, options):
        return 3
class Broken(Rings):
    def model(self, name, options):
        raise KeyError("no such layer")
class Leaves(Rings):
    def model(self, name, options):
        raise SystemExit(0)
class LeavesAtOnce(Rings):
    def __init__(self):
        raise SystemExit(0)
"""


def topotune(
    *arguments: str, cwd: Path, stdout: int | None = None, seconds: float = 120
) -> tuple[int, str]:
    """Exit code and standard error of a command, run in a folder."""
    done = subprocess.run(
        [sys.executable, "-m", "topotune", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": ROOT, "PYTHONSAFEPATH": "1"},
        stdout=subprocess.DEVNULL if stdout is None else stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=seconds,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Three", r"must be a torch\.nn\.Module \(got 3\)"),
        ("Broken", r"cannot be built: KeyError: 'no such layer' \(at theirs\.py:8\)"),
        ("Leaves", r"cannot be built: SystemExit: 0 \(at theirs\.py:11\)"),
        ("LeavesAtOnce", r"SystemExit: 0 \(at theirs\.py:14\)"),
    ],
)
def test_a_model_that_cannot_be_built_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    (tmp_path / "theirs.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    spec = TrialSpec(task=f"theirs:{name}", method="adam", epochs=1, seed=0)
    with pytest.raises(ConfigError, match=words):
        check_buildable(spec)


def test_a_module_that_exits_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=r"SystemExit: 0 \(at script\.py:2\)"):
        load_object("script:Task")


def test_an_exception_is_told_by_its_first_line() -> None:
    assert (
        in_one_line(RuntimeError("out of memory\nframe 1\nframe 2"))
        == "RuntimeError: out of memory"
    )
    assert in_one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30, True, "7"])
@pytest.mark.parametrize("name", ["seed", "split_seed"])
def test_a_seed_that_no_generator_takes_is_refused(name: str, seed: object) -> None:
    data = {"task": "digits", "method": "adam", "epochs": 1, "seed": 0, name: seed}
    with pytest.raises(ConfigError, match=f"{name}: must be a whole number from 0 to"):
        check_spec(TrialSpec(**data))  # type: ignore[arg-type]


def test_training_that_raises_ends_with_an_error_of_one_line(tmp_path: Path) -> None:
    spec = {"task": "digits", "method": "adam", "epochs": 1, "seed": 0, "params": {"lr": 1e300}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(spec))
    code, text = topotune("train", "config.yaml", cwd=tmp_path)
    assert code == 1
    assert "training failed: RuntimeError: value cannot be converted" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("command", [("schema",), ("status",), ("tasks",)], ids=" ".join)
def test_a_full_disk_under_standard_output_is_named(tmp_path: Path, command: tuple[str]) -> None:
    with Path("/dev/full").open("w") as full:
        code, text = topotune(*command, cwd=tmp_path, stdout=full.fileno())
    assert (code, text) == (2, "error: standard output: No space left on device\n")


def test_a_path_that_is_too_long_is_named(tmp_path: Path) -> None:
    code, text = topotune("status", "--results-dir", "a" * 5000, cwd=tmp_path)
    assert code == 2
    assert text.startswith("error: 'aaa")
    assert "File name too long" in text
    assert len(text) < 300


def test_relative_places_of_modules_mean_the_same_in_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((".", "lib", "/opt/lib")))
    _fix_relative_paths()
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [
        str(tmp_path),
        str(tmp_path / "lib"),
        "/opt/lib",
    ]


@pytest.mark.heavy
@pytest.mark.ray
def test_files_named_like_libraries_are_not_run(tmp_path: Path) -> None:
    for name in ("psutil", "fsspec", "pyarrow", "signal", "numpy"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)\nraise ImportError('theirs')\n"
        )
    space = {"lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
    data = {
        "name": "plain",
        "task": "digits",
        "method": "adam",
        "space": space,
        "objective": {"metric": "val_accuracy", "direction": "maximize"},
        "budget": {"trials": 1, "epochs": 1},
    }
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(data))
    code, text = topotune("search", "file.yaml", cwd=tmp_path, seconds=240)
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert code == 0, text
