"""Find what is wrong with a search before anything is started or written.

The search file's own rules hold by then; this builds, in the driver's process, what a worker
would build: task, model and optimizer at the ends of every range, and the names of the metrics.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from topotune.config import SearchConfig
from topotune.errors import ConfigError, ResourceError, UnstableError, did_you_mean
from topotune.records import TrialSpec
from topotune.search.objects.address import store_address
from topotune.search.objects.store import OPENING_SECONDS, ObjectStore
from topotune.search.space import corners

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def preflight(config: SearchConfig, note: Callable[[str], None] = lambda text: None) -> list[str]:
    """Check a search; the metrics that its trials will report.

    A corner of the space whose dynamics cannot settle is noted and allowed while another is
    stable: trials that sample such values end as DIVERGED, which is what teaches the sampler.

    Args:
        config: the search.
        note: told, in a line, of corners that are unstable.

    Raises:
        UnstableError: the dynamics are unstable at every corner of the space.
        UserError: a name that nothing knows, an option that nothing takes, a value that a
            constructor refuses anywhere in the space, data that cannot be had, an objective or a
            constraint on a metric that no trial reports.
    """
    from topotune.train.rehearsal import metric_names

    names = metric_names(_first_stable(corners(config), note))
    wanted = [("objective.metric", objective.metric) for objective in config.objective]
    wanted += [(f"constraints.{name}", name) for name in config.constraints]
    for place, metric in wanted:
        if metric not in names:
            raise ConfigError(place, f"trials report no {metric!r}{did_you_mean(metric, names)}")
    return names


def _first_stable(specs: list[TrialSpec], note: Callable[[str], None]) -> TrialSpec:
    """Build at every corner; the first one that can be trained."""
    from topotune.train.assemble import preflight as preflight_spec

    stable: list[TrialSpec] = []
    unstable: list[UnstableError] = []
    for spec in specs:
        try:
            preflight_spec(spec, check_device=False)
        except UnstableError as error:
            unstable.append(error)
        else:
            stable.append(spec)
    if not stable:
        raise unstable[0]
    if unstable:
        note(
            f"{len(unstable)} of {len(specs)} extremes of the space are unstable; trials there "
            f"will end as DIVERGED. The first: {unstable[0]}"
        )
    return stable[0]


def check_writable(results_dir: Path) -> None:
    """Make sure that a results directory can be made and written, and that files in it can be
    locked, without leaving anything; so can the object store that it stands for, if it does.

    Raises:
        ResourceError: it cannot.
    """
    folder = results_dir.absolute()
    if (address := store_address(folder)) is not None:
        ObjectStore(address, limit=OPENING_SECONDS).check()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ResourceError(f"{folder}: is a file, not a folder. Choose another --results-dir")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ResourceError(
            f"{results_dir}: cannot be written ({folder} is not writable). Choose another "
            "--results-dir"
        )
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise ResourceError(
                f"{results_dir}: cannot be written: {error.strerror}. Make space or choose another "
                "--results-dir"
            ) from error
        raise ResourceError(
            f"{results_dir}: its file system locks no files ({error.strerror}), so that two "
            "writers of one record could not see each other. Mount it with locks (NFS: without "
            "'nolock', with its lock service running; Lustre: with '-o flock'), or choose another "
            "--results-dir"
        ) from error


def fit_resources(
    config: SearchConfig, cluster_cpus: float, cluster_gpus: float
) -> tuple[float, int]:
    """GPUs a trial and trials at once on a cluster of this size.

    Raises:
        ResourceError: one trial alone asks for more than there is.
    """
    wanted = config.resources
    gpus = wanted.gpus if wanted.gpus != "auto" else (1.0 if cluster_gpus >= 1 else 0.0)
    if gpus > cluster_gpus:
        raise ResourceError(
            f"resources.gpus: a trial needs {gpus:g} GPU(s) and Ray sees {cluster_gpus:g}. "
            "Write gpus: auto to use the CPUs where there is no GPU"
        )
    if wanted.cpus > cluster_cpus:
        raise ResourceError(
            f"resources.cpus: a trial needs {wanted.cpus} CPU(s) and Ray sees {cluster_cpus:g}. "
            "Lower resources.cpus"
        )
    fits = int(cluster_cpus // wanted.cpus)
    if gpus > 0:
        # Ray places a fraction within one device, and more than one GPU as whole ones.
        per_gpu = int(1 / gpus + 1e-9) * int(cluster_gpus) if gpus <= 1 else cluster_gpus // gpus
        fits = min(fits, int(per_gpu))
    concurrency = fits if wanted.concurrency == "auto" else min(wanted.concurrency, fits)
    return gpus, max(concurrency, 1)
