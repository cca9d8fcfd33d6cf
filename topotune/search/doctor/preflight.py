"""Find what is wrong with a search before anything is started or written.

The search file's own rules hold by then; this builds, in the driver's process, what a worker
would build: task, model and optimizer at the ends of every range, and the names of the metrics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from topotune.config.models import SearchConfig
from topotune.config.rules import metric_places
from topotune.errors import (
    ConfigError,
    FieldError,
    ResourceError,
    TopotuneError,
    UnstableError,
    UserError,
    combined,
    did_you_mean,
)
from topotune.records import TrialSpec
from topotune.search.place.addresses import study_uri, tracking_uri
from topotune.search.place.objects.address import store_address
from topotune.search.ray.autoscaler import ENVIRONMENT
from topotune.search.ray.cluster import Cluster, Node, amount_of, needs_of
from topotune.search.study.faults import faults_at
from topotune.search.study.space import corners
from topotune.settings import STUDY_URI, TRACKING_URI

MOST_AT_ONCE = 1000
"""Trials at once that one driver starts, however large a cluster may grow."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def preflight(config: SearchConfig, note: Callable[[str], None] = lambda text: None) -> list[str]:
    """Check a search; the metrics that its trials will report.

    A corner of the space whose dynamics cannot settle is noted and allowed while another is
    stable: trials that sample such values end as DIVERGED, which is what teaches the sampler.

    Args:
        config: the search.
        note: gets a line about corners that are unstable, and each of the method's remarks.

    Raises:
        UnstableError: the dynamics are unstable at every corner of the space.
        ConfigError: a name that nothing knows, an option that nothing takes, a value that a
            constructor refuses anywhere in the space, an objective or a constraint on a metric
            that no trial reports, a tracking address of no such form; of several a FaultsError.
        UserError: data that cannot be had, code that fails.
    """
    from topotune.train.methods import build_method
    from topotune.train.rehearsal import metric_names

    tracking_uri(config)  # of a form that can be one
    stable, unstable, found = _examine(config)
    if found:
        raise combined(found)
    if not stable:
        raise unstable[0]
    if unstable:
        note(
            f"{len(unstable)} of {len(unstable) + len(stable)} extremes of the space are unstable; "
            f"trials there will end as DIVERGED. The first: {unstable[0]}"
        )
    for remark in build_method(stable[0]).remarks(corners(config)):
        note(remark)
    names = metric_names(stable[0])
    if unknown := _unknown_metrics(config, names):
        raise combined(unknown)
    return names


def _unknown_metrics(config: SearchConfig, names: list[str]) -> list[FieldError]:
    """The objectives and constraints on metrics that are not among these."""
    return [
        FieldError(place, f"trials report no {metric!r}{did_you_mean(metric, names)}")
        for place, metric in metric_places(config)
        if metric not in names
    ]


def machine_remarks(config: SearchConfig) -> list[str]:
    """Why a search would not start on this machine, whose Ray would have its CPUs and GPUs: a file
    that is checked here may be for a cluster."""
    import torch

    has = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    try:
        fit_resources(config, Cluster((Node(has, has),)))
    except ResourceError as error:
        return [f"it does not start on this machine, if that is where it is to run: {error}"]
    return []


def faults(config: SearchConfig) -> list[FieldError]:
    """What keeps trials anywhere in the space from being built and judged, each key once."""
    try:
        return _examine(config, broken=True)[2]
    except UserError:  # of the environment; the file's own faults come first
        return []


def _examine(
    config: SearchConfig, *, broken: bool = False
) -> tuple[list[TrialSpec], list[UnstableError], list[FieldError]]:
    """The corners that can be built, what those with unstable dynamics raise, and all faults.

    Args:
        config: the search.
        broken: its file has other faults, so that its metrics are looked at in any case.
    """
    from topotune.train.rehearsal import metric_names

    stable: list[TrialSpec] = []
    sound: TrialSpec | None = None
    unstable: list[UnstableError] = []
    found: dict[tuple[str | int, ...], FieldError] = {}
    for spec in corners(config):
        try:
            here, rest = faults_at(config, spec)
        except UnstableError as error:
            unstable.append(error)
            continue
        sound = sound or rest
        for fault in here:
            found.setdefault(fault.path, fault)
        if not here:
            stable.append(spec)
    if sound and (found or broken):
        # For a file that has faults, nothing is downloaded; they are to be seen first.
        with contextlib.suppress(TopotuneError):
            names = metric_names(dataclasses.replace(sound, download=False))
            found |= {fault.path: fault for fault in _unknown_metrics(config, names)}
    return stable, unstable, list(found.values())


def check_writable(results_dir: Path) -> None:
    """Make sure that a results directory can be made and written, and that files in it can be
    locked, without leaving anything; so can the object store that it stands for, if it does.

    Raises:
        ResourceError: it cannot.
    """
    folder = results_dir.absolute()
    if (address := store_address(folder)) is not None:
        from topotune.search.place.objects.store import OPENING_SECONDS, ObjectStore

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


def refuse_sqlite(config: SearchConfig, hosts: int, grows: bool) -> None:
    """Refuse stores in files of one machine on a cluster of several.

    Raises:
        ConfigError: as :func:`sqlite_refusals` gives it.
    """
    study = None if study_uri(config) is None else "postgresql"
    for refusal in sqlite_refusals(study, tracking_uri(config), hosts, grows):
        raise refusal


def sqlite_refusals(
    study: str | None, tracking: str | None, hosts: int, grows: bool
) -> list[ConfigError]:
    """Why these stores do not serve a cluster: over a network file system files of SQLite are
    damaged, and on one machine's disk the next driver may not find a file at all.

    Args:
        study: address of the study's database; None for a file beside the search.
        tracking: address of the tracking store; None for the embedded one.
        hosts: machines of the cluster.
        grows: an autoscaler may add more.
    """
    if hosts < 2 and not grows:
        return []
    size = "that grows" if grows else f"of {hosts} machines"
    on = f"on a cluster {size}"
    refusals = []
    if not (study or "").startswith("postgresql"):
        refusals.append(
            ConfigError(
                STUDY_URI,
                f"is not set, so that the study would be a file of one machine, {on}",
                "Set it to a PostgreSQL database, postgresql://USER@HOST/DATABASE (a new search "
                "needs that: an existing study does not move by itself)",
            )
        )
    if not (tracking or "").startswith(("http://", "https://")):
        refusals.append(
            ConfigError(
                TRACKING_URI,
                f"names no server, so that the MLflow store would be a SQLite file, {on}",
                "Start 'mlflow server' and set it to http://HOST:5000",
            )
        )
    return refusals


def fit_resources(config: SearchConfig, cluster: Cluster) -> tuple[float, int]:
    """GPUs a trial and trials at once on a cluster; what an autoscaler may add to it counts.

    Raises:
        ResourceError: no node that is there, or may come, can hold one trial.
    """
    wanted = config.resources
    gpus = wanted.gpus if wanted.gpus != "auto" else (1.0 if cluster.most("GPU") >= 1 else 0.0)
    needs = needs_of(config, gpus)
    for name, amount in needs.items():
        most = cluster.most(name)
        if amount > most:
            key, fix = _WORDS.get(name, (f"custom.{name}", _CUSTOM_FIX))
            seen = "may get" if cluster.grows else "has"
            raise ResourceError(
                f"resources.{key}: a trial needs {amount_of(name, amount)} and the cluster {seen} "
                f"{most:g}. {fix}"
            )
    if refusal := cluster.refusal(needs):
        raise ResourceError(f"resources: {refusal}. A trial runs on one node: ask for less")
    fits = min(cluster.most_slots(needs), MOST_AT_ONCE)
    concurrency = fits if wanted.concurrency == "auto" else min(wanted.concurrency, fits)
    return gpus, max(concurrency, 1)


_CUSTOM_FIX = (
    "Start nodes that have it (ray start --resources), or take it out. If an autoscaler adds "
    f"such nodes, let {ENVIRONMENT} name its configuration"
)
_WORDS = {
    "CPU": ("cpus", "Lower resources.cpus"),
    "GPU": (
        "gpus",
        "Write gpus: auto to use the CPUs where there is no GPU. If an autoscaler adds GPUs, let "
        f"{ENVIRONMENT} name its configuration",
    ),
}
"""Ray's name of a resource to its key in a search file and what to do where there is too little."""
