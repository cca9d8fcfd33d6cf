"""What messages say of installing is what this environment needs, and works where it is read."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import topotune
from topotune.errors import ConfigError
from topotune.requirements import install_command, installed, pythons, requirements
from topotune.search.doctor.machine import examine
from topotune.search.study.address import with_driver

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_no_message_names_what_only_a_checkout_or_an_index_would_have() -> None:
    package = Path(topotune.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "requirements.py":
            assert not re.search(r"pip install|constraints\.txt|topotune\[[a-z]+\]'", text), path


@pytest.mark.parametrize(
    "line", sorted({*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)})
)
def test_every_requirement_has_a_command_that_resolves_to_it(line: str) -> None:
    wanted = Requirement(line)
    words = shlex.split(install_command(wanted.name))
    assert "install" in words
    assert sys.executable in words
    asked = [Requirement(word) for word in words if re.match(r"[a-z].*[<>=]", word)]
    (found,) = (one for one in asked if one.name == wanted.name)
    assert found.marker is None
    assert str(found.specifier) in {str(wanted.specifier), ""}


def test_the_pair_that_must_fit_is_installed_together_and_names_as_imported_are_known() -> None:
    for name in ("torch", "torchvision"):
        assert {"torch", "torchvision"} <= {
            Requirement(word).name
            for word in shlex.split(install_command(name))
            if re.match(r"torch\w*[<>=]", word)
        }
    assert install_command("sklearn") == install_command("scikit-learn")
    assert install_command("psycopg").endswith("'psycopg[binary]>=3.2'")
    assert installed("no-such-package") == "no-such-package (not installed)"


def test_the_tool_that_the_hint_names_is_there() -> None:
    words = shlex.split(install_command("numpy"))
    if words[0] == sys.executable:
        assert subprocess.run([*words[:3], "--version"], capture_output=True).returncode == 0
    elif shutil.which("uv"):
        done = subprocess.run([*words, "--dry-run", "--offline"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "no changes" in done.stderr  # it is this environment, which has it


def test_a_study_in_postgresql_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.engine import make_url

    url = make_url("postgresql://u@127.0.0.1/d")
    assert with_driver(url).drivername == "postgresql+psycopg"
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"psycopg.*Install it: .*'psycopg\[binary\]>=3\.2'"):
        with_driver(url)


def test_the_interpreters_that_are_named_are_those_that_are_allowed() -> None:
    named = [
        text.rpartition(" ")[2]
        for text in PROJECT["classifiers"]
        if re.search(r"Python :: \d\.\d+$", text)
    ]
    assert named == ["3.11", "3.12", "3.13"]
    assert all(pythons().contains(f"{version}.0") for version in named)
    assert not pythons().contains("3.10.9")
    # Ray has no wheels for it.
    assert not pythons().contains("3.15.0")
    assert str(pythons()) == metadata.metadata("topotune")["Requires-Python"]


def test_the_environment_has_what_the_metadata_asks_for(tmp_path: Path) -> None:
    found = {one.name: one for one in examine(tmp_path, None, with_ray=False)}
    assert {one.name for one in requirements() if one.marker is None} <= set(found)
    assert all(one.ok for one in found.values()), found


HALF = """
import sys
from pathlib import Path
from topotune.search.doctor.machine import examine
from topotune.data.vision import load_vision
from topotune.errors import ResourceError

broken = [one for one in examine(Path("results"), None, with_ray=False) if not one.ok]
print([one.name for one in broken], broken[0].found, broken[0].fix, sep="\\n")
try:
    load_vision("mnist", Path("data"), download=False)
except ResourceError as error:
    print(error)
"""


def test_a_torchvision_that_does_not_fit_torch_is_found_and_named(tmp_path: Path) -> None:
    """Its compiled part is taken away: beside another build of torch it does not load either."""
    real = Path(str(metadata.distribution("torchvision").locate_file("torchvision")))
    shutil.copytree(real, tmp_path / "torchvision", ignore=shutil.ignore_patterns("*.so*"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HALF], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names, found, fix, message = done.stdout.splitlines()
    assert names == "['torchvision']"
    assert "operator torchvision::nms does not exist" in found
    assert fix == install_command("torch", again=True)
    assert message.startswith("mnist: torchvision ")
    assert f"beside {installed('torch')} (operator torchvision::nms does not exist)" in message
    assert message.endswith(fix)
