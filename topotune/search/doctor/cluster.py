"""What ``topotune doctor`` finds on a cluster: the view of a driver, and of a worker on each node.

Everything is tried, not asked for: a file is written to the storage here and read there, the
database and the tracking server are used from both sides, torch counts the GPUs itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from topotune.errors import TopotuneError
from topotune.redaction import brief
from topotune.requirements import install_command
from topotune.search.doctor.machine import MIN_FREE_BYTES, Finding, disk, tried, write_probe
from topotune.search.doctor.preflight import check_writable, sqlite_refusals
from topotune.search.place.objects.address import StoreAddress, is_address
from topotune.search.ray.cluster import Cluster
from topotune.search.ray.session import CONNECT_SECONDS, RaySession
from topotune.search.study.address import try_database
from topotune.search.view import SilentListener
from topotune.settings import STUDY_URI, TRACKING_URI

MAX_SKEW_SECONDS = 5.0
NODE_SECONDS = 120.0
_ALIKE = ("topotune", "torch", "ray", "optuna", "mlflow", "numpy")
_COUNT_GPUS = (
    "import json, torch; "
    "print(json.dumps([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]))"
)


@dataclass(frozen=True)
class Stores:
    """Where a cluster's searches keep their things; None for what is not set."""

    storage: str
    study: str | None
    tracking: str | None


def examine_cluster(stores: Stores, address: str = "auto") -> list[Finding]:
    """All checks of a cluster, run by a process on it.

    Args:
        stores: as the cluster's environment names them.
        address: of the Ray that runs there.
    """
    findings = [_authentication(), *examine_here(stores, {})]
    findings = [replace(one, place="driver") for one in findings]
    try:
        with RaySession(address, SilentListener()) as session:
            cluster, hosts = session.cluster(), session.hosts()
            findings.append(_cluster(cluster, hosts))
            for error in sqlite_refusals(stores.study, stores.tracking, hosts, cluster.grows):
                text = f"{error.place} {error.problem}"
                findings.append(Finding("sqlite", False, text, error.fix, "driver"))
            findings += _examine_nodes(session, stores)
    except (TopotuneError, RuntimeError, OSError) as error:
        findings.append(Finding("ray", False, brief(str(error), 300), "Is it still up?", "driver"))
    return findings


def examine_here(stores: Stores, expected: dict[str, str], probe: str = "") -> list[Finding]:
    """The checks of one machine.

    Args:
        stores: as above.
        expected: the driver's versions; empty on the driver.
        probe: a file of the storage that the driver has written; empty on the driver.
    """
    if expected:
        used = _reached(stores)
    else:
        used = [
            tried(
                "study", lambda: _study(stores.study), f"Set {STUDY_URI} right, password and all"
            ),
            tried("tracking", lambda: _tracking(stores.tracking), f"Set {TRACKING_URI} right"),
        ]
    return [
        _versions(expected),
        tried("storage", lambda: _storage(stores.storage, probe), "Mount it on every node"),
        disk(folder := Path(tempfile.gettempdir()), f" for Ray in {folder}"),
        *used,
    ]


def _reached(stores: Stores) -> list[Finding]:
    """The way to the stores from a node; only drivers have their passwords, and need them."""
    found = []
    for name, address, port in (("study", stores.study, 5432), ("tracking", stores.tracking, 80)):
        parts = urlsplit(address or "")
        if parts.hostname:
            where = (parts.hostname, parts.port or (443 if parts.scheme == "https" else port))
            fix = "Open that port to this node, or name the store by an address it can reach"
            found.append(tried(name, functools.partial(_listens, where), fix))
    return found


def _listens(where: tuple[str, int]) -> str:
    socket.create_connection(where, CONNECT_SECONDS).close()
    return f"{where[0]}:{where[1]} can be reached (only drivers log in)"


def versions() -> dict[str, str]:
    """Python's and the packages' versions here."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in _ALIKE:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _authentication() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() == "token":
        return Finding("authentication", True, "Ray asks for a token")
    return Finding(
        "authentication",
        False,
        "Ray takes orders from anybody who reaches it",
        "Start every node with RAY_AUTH_MODE=token and one token (ray get-auth-token --generate)",
    )


def _cluster(cluster: Cluster, hosts: int) -> Finding:
    own = {name for node in cluster.nodes for name in node.total if ":" not in name}
    names = {"CPU", "GPU", *own} - {"memory", "object_store_memory"}
    text = ", ".join(f"{cluster.total(name):g} {name}" for name in sorted(names))
    return Finding("cluster", True, f"{hosts} machines, {text}", "", "driver")


def _examine_nodes(session: RaySession, stores: Stores) -> Iterator[Finding]:
    """A worker on each node looks around; all at the same time."""
    folder = None if is_address(stores.storage) else Path(stores.storage)
    probe = f".topotune-doctor-{secrets.token_hex(6)}"
    bare = replace(
        stores, study=_without_login(stores.study), tracking=_without_login(stores.tracking)
    )
    with contextlib.suppress(OSError):  # the driver's own check has found and said it
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / probe).write_text("driver", encoding="ascii")
    look, sent = functools.partial(_look, bare, versions(), probe), time.time()
    for place, answer, error in session.on_each_node(look, NODE_SECONDS):
        if answer is None:
            text = f"no worker answers there: {brief(error, 200)}"
            yield Finding("worker", False, text, "Look into its Ray logs", place)
            continue
        data, clock = answer
        found = [Finding(**one) for one in json.loads(data)]
        for one in (*found, _skew(clock, sent, time.time())):
            yield replace(one, place=place)
    for path in folder.glob(f"{probe}*") if folder is not None else ():
        path.unlink(missing_ok=True)


def _without_login(address: str | None) -> str | None:
    """An address with neither user nor password, which no node needs."""
    if address is None:
        return None
    scheme, mark, rest = address.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"


def _look(stores: Stores, expected: dict[str, str], probe: str, gpus: float) -> tuple[str, float]:
    """In a worker: its findings as JSON, and its clock."""
    clock = time.time()
    findings = [*examine_here(stores, expected, probe), _gpus(gpus)]
    return json.dumps([one.to_dict() for one in findings]), clock


def _versions(expected: dict[str, str]) -> Finding:
    found = versions()
    wrong = [
        f"{name} {found[name]} (driver: {version})"
        for name, version in expected.items()
        if found[name] != version
    ]
    if wrong:
        fix = "Install the same versions on every node: one image, or the driver's 'pip freeze'"
        return Finding("versions", False, ", ".join(wrong), fix)
    return Finding("versions", True, ", ".join(f"{name} {found[name]}" for name in found))


def _storage(storage: str, probe: str) -> str:
    if is_address(storage):
        from topotune.search.place.objects.store import READER_SECONDS, ObjectStore

        ObjectStore(StoreAddress.parse(storage), limit=READER_SECONDS).check()
        return f"{storage} written, read and deleted from"
    folder = Path(storage)
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_probe(folder, f"{probe or '.topotune-doctor'}-")
    if probe and not (folder / probe).is_file():
        raise RuntimeError(f"{storage} is another folder here than on the driver's machine")
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise RuntimeError(f"{storage} has {free / 2**30:.1f} GiB free")
    return f"{storage} written and read, {free / 2**30:.0f} GiB free"


def _study(address: str | None) -> str:
    return try_database(address) if address else "a file beside each search"


def _tracking(address: str | None) -> str:
    if not address:
        return "a SQLite store beside the searches"
    from topotune.tracking.mlflow import MlflowStore

    store = MlflowStore(address)
    store.ping()
    return f"{store.label} answers"


def _skew(clock: float, sent: float, heard: float) -> Finding:
    """How far a node's clock is off, at least: it read it between our sending and hearing."""
    off = max(sent - clock, clock - heard, 0.0)
    fix = "" if off <= MAX_SKEW_SECONDS else "Run a time service (chrony) on every node"
    return Finding("clock", not fix, f"at most {off + 0.05:.1f} s off", fix)


def _gpus(promised: float) -> Finding:
    """What torch sees, in a process of its own: Ray hides GPUs from tasks that ask for none."""
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-P", "-c", _COUNT_GPUS]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=NODE_SECONDS / 2
        )
    except subprocess.TimeoutExpired:
        return Finding("gpus", False, "torch does not answer", "Look into the GPU's driver")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Finding(
            "gpus",
            False,
            f"torch fails: {brief(last, 200)}",
            f"Do {install_command('torch', again=True)}",
        )
    names: list[str] = json.loads(done.stdout.strip().splitlines()[-1])
    seen = f"torch sees {len(names)} ({', '.join(sorted(set(names)))})" if names else "none"
    if promised > len(names):
        fix = "Install a torch that fits the GPU driver, or correct --num-gpus"
        return Finding("gpus", False, f"Ray offers {promised:g}, {seen}", fix)
    return Finding("gpus", True, f"{seen}; Ray offers {promised:g}; host {socket.gethostname()}")
