"""What ``topotune doctor`` looks at: each finding says what was seen and how to mend it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from topotune import __version__
from topotune.errors import TopotuneError
from topotune.redaction import brief
from topotune.requirements import IMPORT_NAMES, install_command, pythons, requirements
from topotune.search.doctor.findings import MIN_FREE_BYTES, Finding
from topotune.search.view import SilentListener


def examine(results_dir: Path, data_dir: Path | None, with_ray: bool) -> list[Finding]:
    """All checks, in the order that a person would mend them."""
    needed = [one for one in requirements() if one.marker is None]
    findings = [_python(), Finding("topotune", True, __version__), *map(_package, needed)]
    whole = all(one.ok for one in findings)
    findings += [_folder(results_dir), _disk(results_dir)]
    if whole:  # what follows needs the packages
        findings += [_devices(), _data(data_dir)]
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


def _folder(results_dir: Path) -> Finding:
    """Really write a file where results would go, and leave nothing behind."""
    from topotune.search.doctor.preflight import check_writable

    folder = results_dir.absolute()
    try:
        check_writable(folder)
        while not folder.exists():
            folder = folder.parent
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b"topotune")
            probe.flush()
            os.fsync(probe.fileno())
    except (TopotuneError, OSError) as error:
        return Finding("results folder", False, str(error), "Choose another --results-dir")
    return Finding("results folder", True, f"{results_dir.absolute()} can be written")


def _disk(results_dir: Path) -> Finding:
    folder = results_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    ok = free >= MIN_FREE_BYTES
    return Finding("disk", ok, f"{free / 2**30:.1f} GiB free", "" if ok else "Free some space")


def _data(data_dir: Path | None) -> Finding:
    """The data sets that need no download must load."""
    from topotune.tasks import DataOptions, build_task

    options = DataOptions(data_dir=None if data_dir is None else str(data_dir))
    try:
        sizes = []
        for name in ("mnist5k", "digits"):
            splits = build_task(name, {}).splits(options)
            sizes.append(f"{name} {len(splits.train)}/{len(splits.val)}/{len(splits.test)}")
    except TopotuneError as error:
        return Finding("data", False, brief(str(error), 300), "Do what that says")
    return Finding("data", True, ", ".join(sizes) + " (train/validation/test)")


def _ray() -> Finding:
    from topotune.search.ray.session import RaySession, usual_folder

    try:
        with RaySession("local", SilentListener()) as session:
            cpus, gpus = session.size()
            answer = session.probe()
    except (TopotuneError, RuntimeError, OSError) as error:
        text = brief(str(error), 200)
        return Finding("ray", False, text, f"Look into the newest folder under {usual_folder()}")
    return Finding("ray", True, f"local cluster with {cpus:g} CPUs, {gpus:g} GPUs; a task {answer}")
