"""What ``topotune doctor`` looks at: each finding says what was seen and how to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from pathlib import Path

from topotune.errors import TopotuneError
from topotune.redaction import brief
from topotune.search.findings import MIN_FREE_BYTES, Finding
from topotune.search.view import SilentListener

_PACKAGES = ("topotune", "torch", "torchvision", "ray", "optuna", "mlflow", "pydantic", "numpy")


def examine(results_dir: Path, data_dir: Path | None, with_ray: bool) -> list[Finding]:
    """All checks, in the order that a person would mend them."""
    findings = [_python(), *map(_package, _PACKAGES), _devices(), _folder(results_dir)]
    findings += [_disk(results_dir), _data(data_dir)]
    if with_ray:
        findings.append(_ray())
    return findings


def _python() -> Finding:
    version = platform.python_version()
    ok = tuple(map(int, platform.python_version_tuple()[:2])) >= (3, 11)
    return Finding("python", ok, version, "" if ok else "Install Python 3.11 or later")


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        fix = f"Install it: pip install {name} -c constraints.txt"
        return Finding(name, False, "not installed", fix)


def _devices() -> Finding:
    import torch

    cpus = len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        return Finding("devices", True, f"{cpus} CPUs, torch sees no GPU (searches use the CPUs)")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("devices", True, f"{cpus} CPUs, {len(names)} GPUs: {', '.join(names)}")


def _folder(results_dir: Path) -> Finding:
    """Really write a file where results would go, and leave nothing behind."""
    from topotune.search.preflight import check_writable

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
        return Finding("data", False, str(error), "Reinstall topotune with its dependencies")
    return Finding("data", True, ", ".join(sizes) + " (train/validation/test)")


def _ray() -> Finding:
    from topotune.search.session import RaySession, usual_folder

    try:
        with RaySession("local", SilentListener()) as session:
            cpus, gpus = session.size()
            answer = session.probe()
    except (TopotuneError, RuntimeError, OSError) as error:
        text = brief(str(error), 200)
        return Finding("ray", False, text, f"Look into the newest folder under {usual_folder()}")
    return Finding("ray", True, f"local cluster with {cpus:g} CPUs, {gpus:g} GPUs; a task {answer}")
