"""Where the embedded store keeps files: inside of its results folder, also after that was moved.

MLflow's database holds absolute addresses: of experiments, runs, logged models, model versions and
traces. A results folder that was moved or copied holds those of its old place. They are re-based
here, before MLflow reads them; a folder from others cannot make us write outside of it either way.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from topotune.tracking.store import (
    DATABASE_FILE,
    SEARCH_TAG,
    creation_lock,
    embedded_artifacts,
    refuse_links,
)

_log = logging.getLogger(__name__)

_ROOT = ("mlflow", "artifacts")
_BUSY_SECONDS = 15.0
_PLAIN = re.compile(r"[0-9A-Za-z_-]+")
_OUR_RUNS = f"SELECT run_uuid FROM tags WHERE key = '{SEARCH_TAG}'"


class _Column(NamedTuple):
    """A column of MLflow's database that holds addresses.

    Attributes:
        table: its table.
        name: the column.
        default: SQL for the part below ``artifacts`` of an address that names no such folder; NULL
            where topotune has no part in the row, whose address then stays.
        rows: SQL, which rows hold addresses.
    """

    table: str
    name: str
    default: str = "NULL"
    rows: str = "1"


_COLUMNS = (
    _Column(
        "experiments",
        "artifact_location",
        "CASE WHEN name = :experiment OR experiment_id IN "
        f"(SELECT experiment_id FROM runs WHERE run_uuid IN ({_OUR_RUNS})) "
        "THEN CAST(experiment_id AS TEXT) END",
    ),
    _Column(
        "runs",
        "artifact_uri",
        f"CASE WHEN run_uuid IN ({_OUR_RUNS}) "
        "THEN experiment_id || '/' || run_uuid || '/artifacts' END",
    ),
    _Column("logged_models", "artifact_location"),
    _Column("model_versions", "source"),
    _Column("model_versions", "storage_location"),
    _Column("trace_tags", "value", rows="key = 'mlflow.artifactLocation'"),
    _Column("workspaces", "default_artifact_root"),
    _Column("workspaces", "trace_archival_location"),
)


def is_inside(uri: str, folder: Path) -> bool:
    """Whether a ``file:`` address lies below a folder, each by its real path: either may have been
    written down through a link or with ``..`` in it."""
    path = _path(uri) if uri.startswith("file:") else None
    return path is not None and Path(os.path.realpath(folder)) in _real(path).parents


@contextmanager
def own_files(
    results_dir: Path | None, experiment: str, make: Callable[[Path], None]
) -> Iterator[None]:
    """Hold the lock of a results folder's embedded store, with its database whole and its artifacts
    in this folder.

    Args:
        results_dir: the folder; None for any other store, which is left alone.
        experiment: name of the experiment that is used now.
        make: makes the database where it is missing.

    Raises:
        ResourceError: it holds links, or cannot be written.
        sqlite3.Error: its database is damaged, or locked for too long.
    """
    if results_dir is None:
        yield
        return
    refuse_links(results_dir)
    artifacts = embedded_artifacts(results_dir)
    database = artifacts.with_name(DATABASE_FILE)
    with creation_lock(database.parent):
        make(database)
        rebase(database, artifacts, experiment)
        yield


def rebase(database: Path, artifacts: Path, experiment: str) -> int:
    """Re-base what an embedded database keeps outside of its results folder onto it.

    The part after ``mlflow/artifacts`` is kept. Without one that can be trusted, what
    topotune writes to moves to ``EXPERIMENT_ID[/RUN_ID/artifacts]``, and the rest stays.

    Args:
        database: an SQLite file that exists; its creation lock is held.
        artifacts: where its results folder keeps artifacts.
        experiment: name of the experiment that is used now.

    Returns:
        How many addresses were changed; all of them, or none with an exception.

    Raises:
        sqlite3.Error: the file is damaged, or locked for too long.
    """
    changed, example = 0, ""
    # Looked at first: there is rarely anything to do, and then no writer is waited for.
    with closing(sqlite3.connect(database, _BUSY_SECONDS, isolation_level=None)) as connection:
        if next(_strays(connection, artifacts, experiment), None) is None:
            return 0
        connection.execute("BEGIN IMMEDIATE")
        for column, row, old, new in list(_strays(connection, artifacts, experiment)):
            connection.execute(
                f"UPDATE {column.table} SET {column.name} = ? WHERE rowid = ?", (new, row)
            )
            changed, example = changed + 1, example or old
        connection.execute("COMMIT")
    if changed:
        _log.warning(
            "%s: was moved or copied here, and named other folders for its artifacts (%.300r); "
            "it now keeps them in %s. %d addresses changed",
            database,
            example,
            artifacts,
            changed,
        )
    return changed


def _strays(
    connection: sqlite3.Connection, artifacts: Path, experiment: str
) -> Iterator[tuple[_Column, int, str, str]]:
    """Every address outside of a folder that can be re-based: column, row, old and new address."""
    base = artifacts.as_uri()
    for column in _COLUMNS:
        known = {row[1] for row in connection.execute(f"PRAGMA table_info({column.table})")}
        if column.name not in known:  # another version's database
            continue
        name = column.name
        # Nearly all begin as they should: SQLite passes over these by itself.
        query = (
            f"SELECT rowid, {name}, {column.default} FROM {column.table} WHERE {column.rows} "
            f"AND typeof({name}) = 'text' AND NOT ({name} = :base OR (substr({name}, 1, :length) "
            f"= :base || '/' AND {name} NOT LIKE '%..%' AND {name} NOT LIKE '%\\%2e%' ESCAPE '\\'))"
        )
        values = {"base": base, "length": len(base) + 1, "experiment": experiment}
        wanted = {k: v for k, v in values.items() if f":{k}" in query}
        for row, old, default in connection.execute(query, wanted):
            new = _rebased(old, default, artifacts)
            if new is not None:
                yield column, row, old, new


def _rebased(uri: str, default: str | None, artifacts: Path) -> str | None:
    """An address's new form; None where it is inside, no local one, or none of our business."""
    path = _path(uri)
    if path is None or _lies_in(path, artifacts):
        return None
    parts = path.parts
    for end in range(len(parts), 1, -1):
        if parts[end - 2 : end] == _ROOT:
            rest = parts[end:]
            if ".." not in rest:
                return artifacts.joinpath(*rest).as_uri()
            break
    rest = tuple((default or "").split("/"))
    return artifacts.joinpath(*rest).as_uri() if all(map(_PLAIN.fullmatch, rest)) else None


def _lies_in(path: Path, folder: Path) -> bool:
    real, root = _real(path), Path(os.path.realpath(folder))
    return real == root or root in real.parents


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _path(uri: str) -> Path | None:
    """The local path of a ``file:`` address or bare path; None of anything else."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return None
    if parts.scheme not in ("", "file") or not parts.path:
        return None
    path = url2pathname(parts.path) if parts.scheme else uri
    return None if "\0" in path else Path(path)
