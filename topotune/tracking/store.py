"""What the shipper asks of a tracking store, and where the store of a results folder lies."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

from topotune.errors import ConfigError, ResourceError, RunError, TrackingError
from topotune.redaction import redact
from topotune.tracking.entries import Item

DATABASE_FILE = "mlflow.db"
LOCK_FILE = ".create.lock"
DEFAULT_EXPERIMENT = "topotune"
SEARCH_TAG = "topotune.search_id"
TRIAL_TAG = "topotune.trial"
ROLE_TAG = "topotune.role"
PARENT_TAG = "mlflow.parentRunId"

_PORT = re.compile(r":([^\]:]+)$")
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")


class StoreOfflineError(RunError):
    """The store cannot take anything now (down, slow, locked, wrong password): try again later."""


class StoreRefusedError(TrackingError):
    """The store works and will never take this: trying again is useless."""


class RunMissingError(RunError):
    """The store knows no such run: it was replaced, or the run was removed for good."""


@dataclass(frozen=True)
class StoredRun:
    """A run as the store knows it.

    Attributes:
        run_id: MLflow's id.
        trial: the trial's number; None for the search's own run.
        start_ms: start, Unix milliseconds.
        status: MLflow's status word.
        deleted: whether it lies in MLflow's bin.
        tags: all its tags.
        latest: the last value of each metric.
    """

    run_id: str
    trial: int | None
    start_ms: int
    status: str
    deleted: bool
    tags: dict[str, str]
    latest: dict[str, float]

    @classmethod
    def of(cls, run: Any) -> Self:
        """From an ``mlflow.entities.Run``."""
        trial = run.data.tags.get(TRIAL_TAG, "")
        return cls(
            run_id=run.info.run_id,
            trial=int(trial) if trial.isdecimal() else None,
            start_ms=run.info.start_time or 0,
            status=run.info.status,
            deleted=run.info.lifecycle_stage != "active",
            tags=dict(run.data.tags),
            latest=dict(run.data.metrics),
        )


@dataclass(frozen=True)
class NewRun:
    """What a run is made with."""

    search_id: str
    trial: int | None
    name: str
    start_ms: int
    parent_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


class Store(Protocol):
    """A tracking store. Every method may raise StoreOfflineError; those that send also
    StoreRefusedError, and those that name a run RunMissingError."""

    @property
    def label(self) -> str:
        """Address and experiment in one line, without secrets."""

    @property
    def experiment_id(self) -> str:
        """The store's id of the experiment."""

    def experiment_tags(self) -> dict[str, str]:
        """All tags of the experiment."""

    def tag_experiment(self, tags: Mapping[str, str]) -> None:
        """Set tags of the experiment; others stay."""

    def runs(self, search_id: str, trial: int | None = None) -> list[StoredRun]:
        """The runs of a search that carry its tag, oldest first; of one trial if it is given."""

    def parent(self, search_id: str) -> StoredRun | None:
        """The search's own run."""

    def create_run(self, run: NewRun) -> str:
        """Make a run and return its id."""

    def log(self, run_id: str, batch: Sequence[Item]) -> None:
        """Send one batch, within MLflow's limits."""

    def log_artifact(self, run_id: str, path: Path, folder: str) -> None:
        """Upload one file, replacing one of the same name."""

    def log_data(self, run_id: str, name: str, digest: str, rows: str) -> None:
        """Say which data set a run saw; the same once more changes nothing."""

    def terminate(self, run_id: str, status: str, end_ms: int) -> None:
        """Set a final status."""

    def reopen(self, run_id: str) -> None:
        """Set a run back to RUNNING."""


def embedded_store_uri(results_dir: Path) -> str:
    """The address of the SQLite store that all searches of a results folder share.

    Raises:
        ConfigError: the path holds a ``?`` or ``%``, which mean something else in an address (and
            whose escapes not every SQLAlchemy undoes).
    """
    path = results_dir.absolute() / "mlflow" / DATABASE_FILE
    if "?" in str(path) or "%" in str(path):
        raise ConfigError(
            f"results folder {results_dir}",
            "its path holds a '?' or '%', which an address of an SQLite store cannot",
            "Choose another --results-dir",
        )
    return f"sqlite:///{path}"


def embedded_artifacts(results_dir: Path) -> Path:
    """Where the embedded store keeps artifacts."""
    return results_dir.absolute() / "mlflow" / "artifacts"


def refuse_links(results_dir: Path) -> None:
    """The embedded store of a results folder from elsewhere must not be one outside of it.

    Raises:
        ResourceError: its folder, its database or its artifacts' folder is a link.
    """
    artifacts = embedded_artifacts(results_dir)
    folder = artifacts.parent
    files = [folder / f"{DATABASE_FILE}{end}" for end in ("", "-journal", "-wal", "-shm")]
    for path in (folder, artifacts, folder / LOCK_FILE, *files):
        if path.is_symlink():
            raise ResourceError(
                f"{path}: is a link, and a results folder holds its own store only. Put there what "
                "it points to, or name that store in tracking.uri"
            )


def check_tracking_uri(uri: str) -> str:
    """The address of a tracking store as it was given, if its form is one that works.

    Raises:
        ConfigError: a file store, a bare path, an unknown scheme or a wrong port. The
            address is quoted without its secrets.
    """
    try:
        parts = urlsplit(uri)
        scheme, netloc, path = parts.scheme.partition("+")[0], parts.netloc, parts.path
    except ValueError:
        scheme = netloc = path = ""
    if uri != "databricks" and (scheme not in _SCHEMES or "://" not in uri):
        raise ConfigError(
            f"tracking URI {redact(uri)!r}",
            f"its scheme must be one of {', '.join(_SCHEMES)}",
            "Write 'http://HOST:5000' for a server or 'sqlite:////PATH/mlflow.db' for a local "
            "store; MLflow no longer takes plain folders",
        )
    if scheme in ("http", "https") and (not parts.hostname or any(map(str.isspace, netloc))):
        raise ConfigError(
            f"tracking URI {redact(uri)!r}",
            "names no host",
            "Write 'http://HOST:5000', and a space of a password as %20",
        )
    # The password of a database may hold a '/', which is not where its host ends.
    whole = scheme in ("http", "https") or "@" not in path
    if whole and not _has_port(netloc):
        raise ConfigError(
            f"tracking URI {redact(uri)!r}",
            "its port must be a number from 1 to 65535",
            "Write 'http://HOST:5000', and a '/' of a password as %2F",
        )
    return uri


def _has_port(netloc: str) -> bool:
    """Whether the port of a host is one, or is left out."""
    port = _PORT.search(netloc.rpartition("@")[2])
    return port is None or (port[1].isdecimal() and 0 < int(port[1]) < 2**16)


@contextmanager
def creation_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder/.create.lock``, so that one process at a time makes or migrates a store.

    Raises:
        ResourceError: the folder cannot be made or written.
    """
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written: {error.strerror}. Choose a writable --results-dir"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
