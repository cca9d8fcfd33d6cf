"""What ``topotune doctor`` looks at: each finding says what was seen and how to mend it."""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from topotune import __version__
from topotune.errors import TopotuneError
from topotune.redaction import brief
from topotune.requirements import IMPORT_NAMES, install_command, pythons, requirements
from topotune.search.view import SilentListener

MIN_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One check: its name, whether it is fine, what was seen, the fix if it is not, and where."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    place: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For a script."""
        return dataclasses.asdict(self)


def tried(name: str, check: Callable[[], str], fix: str) -> Finding:
    """What a check has seen, or the error that it ended with."""
    try:
        return Finding(name, True, check())
    except (TopotuneError, OSError, ImportError, RuntimeError) as error:
        return Finding(name, False, brief(str(error), 300), fix)


def examine(results_dir: Path, data_dir: Path | None, with_ray: bool) -> list[Finding]:
    """All checks, in the order that a person would mend them."""
    needed = [one for one in requirements() if one.marker is None]
    findings = [_python(), Finding("topotune", True, __version__), *map(_package, needed)]
    whole = all(one.ok for one in findings)
    folder = results_dir.absolute()
    fix = "Choose another --results-dir"
    findings += [tried("results folder", lambda: _folder(folder), fix), disk(folder)]
    if whole:  # what follows needs the packages
        findings += [_devices(), tried("data", lambda: _data(data_dir), "Do what that says")]
    if whole and with_ray:
        findings.append(_ray())
    return findings


def _python() -> Finding:
    version = platform.python_version()
    ok = pythons().contains(version, prereleases=True)
    return Finding("python", ok, version, "" if ok else f"Install a Python {pythons()}")


def _package(wanted: Requirement) -> Finding:
    """Really import it: what is installed may still not load, as a torchvision does that was
    compiled for another torch."""
    name = wanted.name
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", install_command(name))
    fix = install_command(name, again=True)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(name, False, f"{version}, topotune needs {wanted.specifier}", fix)
    try:
        importlib.import_module(IMPORT_NAMES.get(name, name))
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything
        seen = f"{version} cannot be imported: {type(error).__name__}: {brief(str(error), 200)}"
        return Finding(name, False, seen, fix)
    return Finding(name, True, version)


def _devices() -> Finding:
    import torch

    cpus = len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        return Finding("devices", True, f"{cpus} CPUs, torch sees no GPU (searches use the CPUs)")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("devices", True, f"{cpus} CPUs, {len(names)} GPUs: {', '.join(names)}")


def _folder(folder: Path) -> str:
    from topotune.search.doctor.preflight import check_writable

    check_writable(folder)
    write_probe(_existing(folder))
    return f"{folder} can be written"


def write_probe(folder: Path, prefix: str = "") -> None:
    """Really write a file into a folder, and leave nothing behind.

    Raises:
        OSError: it cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=prefix) as probe:
        probe.write(b"topotune")
        probe.flush()
        os.fsync(probe.fileno())


def _existing(folder: Path) -> Path:
    """The folder, or the one in which it would be made."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def disk(folder: Path, use: str = "") -> Finding:
    """What is free where a folder is, or would be made."""
    free = shutil.disk_usage(_existing(folder)).free
    fix = "" if free >= MIN_FREE_BYTES else "Free some space"
    return Finding("disk", not fix, f"{free / 2**30:.1f} GiB free{use}", fix)


def _data(data_dir: Path | None) -> str:
    """The data sets that need no download must load."""
    from topotune.tasks import DataOptions, build_task

    options = DataOptions(data_dir=None if data_dir is None else str(data_dir))
    sizes = []
    for name in ("mnist5k", "digits"):
        splits = build_task(name, {}).splits(options)
        sizes.append(f"{name} {len(splits.train)}/{len(splits.val)}/{len(splits.test)}")
    return ", ".join(sizes) + " (train/validation/test)"


def _ray() -> Finding:
    from topotune.search.ray.session import RaySession, usual_folder

    def run() -> str:
        with RaySession("local", SilentListener()) as session:
            cpus, gpus = session.size()
            return f"local cluster with {cpus:g} CPUs, {gpus:g} GPUs; a task {session.probe()}"

    return tried("ray", run, f"Look into the newest folder under {usual_folder()}")
