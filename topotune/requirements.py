"""What topotune's own metadata asks of Python and of other packages, and how to install them.

Messages take their commands from here: what they name is what the installed topotune asks for, and
the command is for the Python that runs it, in a checkout as after ``pip install`` of a wheel.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

_TOGETHER = ("torch", "torchvision")
"""The second is compiled for one release and build of the first."""
IMPORT_NAMES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
"""Of the packages that are imported by another name than they are installed by."""


def requirements() -> list[Requirement]:
    """All that the metadata asks for; what only an extra needs has a marker."""
    try:
        return [Requirement(line) for line in metadata.requires("topotune") or ()]
    except metadata.PackageNotFoundError:  # it runs from a folder on the path
        return []


def pythons() -> SpecifierSet:
    """The versions of Python that topotune runs on."""
    try:
        return SpecifierSet(metadata.metadata("topotune")["Requires-Python"])
    except metadata.PackageNotFoundError:
        return SpecifierSet()


def installed(package: str) -> str:
    """A package and its version here, such as ``torch 2.11.0+cpu``."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} (not installed)"


def install_command(package: str, again: bool = False) -> str:
    """A command line that installs a package into the environment of this Python.

    Args:
        package: its name, as installed or as imported. torch and torchvision go together.
        again: install it anew, though it is there.
    """
    package = {value: name for name, value in IMPORT_NAMES.items()}.get(package, package)
    wanted = {one.name: one for one in reversed(requirements())}  # a package's own line is first
    names = _TOGETHER if package in _TOGETHER else (package,)
    asked = [str(wanted.get(name, name)).partition(";")[0].strip() for name in names]
    # An environment that uv made has no pip.
    if importlib.util.find_spec("pip"):
        tool, afresh = [sys.executable, "-m", "pip", "install"], "--force-reinstall"
    else:
        tool, afresh = ["uv", "pip", "install", "--python", sys.executable], "--reinstall"
        if package in _TOGETHER and installed("torch").endswith("+cpu"):
            tool += ["--torch-backend", "cpu"]  # pip can only be given the index of CPU builds
    return shlex.join([*tool, *([afresh] if again else []), *asked])
