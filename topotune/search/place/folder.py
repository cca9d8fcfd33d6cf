"""The results folder of one search: its layout, its identity and who drives it.

::

    NAME/
      search.json        identity: search id, the validated config, versions
      search.yaml        the search file as the user wrote it
      study.jsonl        the Optuna study, the source of truth; of one in PostgreSQL a copy
      study.copy.jsonl   the same a second time
      driver.lock        held by the one process that drives the search
      live.json          why trials wait and which run, while a driver lives
      outbox.jsonl       what is recorded for MLflow, and shipped.json: how far it is sent
      trials/0007/       checkpoints, trace and errors of trial 7
      code/              what was shipped with it to a cluster: the user's own modules
      sources/           which code each session ran (topotune.search.code.source)
"""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from topotune.config.file import parse_search
from topotune.config.models import SAFE_NAME, SearchConfig
from topotune.errors import ConfigError, ResourceError, SearchFolderError
from topotune.files import write_atomically
from topotune.redaction import redact
from topotune.search.place.objects.address import shown_place
from topotune.search.place.objects.pull import fetch, fetch_searches

STUDY_FILE, STUDY_COPY = "study.jsonl", "study.copy.jsonl"
LAYOUT = 2
"""Of the results folder; 0.1.0 had another, and wrote no number."""
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError),
)
"""What a damaged identity can raise while it is taken apart."""


def write_text(path: Path, text: str) -> None:
    """Replace a small text file as a whole: a reader sees the old or the new one.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(
    path: Path,
    content: bytes,
    keep: Path | None = None,
    fence: Callable[[], None] = lambda: None,
) -> None:
    """As :func:`write_text`; the file's present version moves to ``keep``, unless ``fence`` raises.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    try:
        write_atomically(path, content, keep, fence)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> ResourceError:
    """The error for a file of a search that the disk does not take."""
    return ResourceError(
        f"{path}: cannot be written: {error.strerror}. Make space or make the folder writable, "
        "then resume"
    )


@dataclass(frozen=True)
class SearchFolder:
    """Paths of one search. ``open`` and ``create`` check that it is what it claims to be."""

    root: Path

    @property
    def name(self) -> str:
        """The search's name."""
        return self.root.name

    @property
    def meta(self) -> Path:
        """Identity and config."""
        return self.root / "search.json"

    @property
    def lock(self) -> Path:
        """The driver's lease."""
        return self.root / "driver.lock"

    @property
    def code(self) -> Path:
        """What was shipped with the search to a cluster."""
        return self.root / "code"

    @property
    def sources(self) -> Path:
        """Which code its sessions ran."""
        return self.root / "sources"

    @property
    def live(self) -> Path:
        """What the driver is at, for others to read."""
        return self.root / "live.json"

    def trial(self, number: int) -> Path:
        """Everything of one trial."""
        return self.root / "trials" / f"{number:04d}"

    @classmethod
    def check_free(cls, results_dir: Path, config: SearchConfig) -> Self:
        """Where a new search would lie, if nothing lies there yet.

        Raises:
            SearchFolderError: a search of that name, or something else, is there.
        """
        folder = cls(results_dir.absolute() / config.name)
        fetch(results_dir, config.name, "search.json")
        folder._refuse_foreign()
        if folder.meta.exists():
            same = folder.config() == config
            raise SearchFolderError(
                f"{folder.root}: holds "
                + ("this search already" if same else f"another search named {config.name!r}")
                + f". Continue it with 'topotune resume {config.name}', or start a new one with "
                "--name OTHER or another --results-dir"
            )
        if folder.root.exists() and not folder.root.is_dir():
            raise SearchFolderError(f"{folder.root}: is a file. Choose --name or --results-dir")
        if folder.root.exists() and not folder._is_stub():
            raise SearchFolderError(
                f"{folder.root}: is not empty and holds no search. Choose --name or --results-dir"
            )
        return folder

    @classmethod
    def create(cls, results_dir: Path, config: SearchConfig, source: str) -> Self:
        """A new search's folder, with its identity written last so that it is whole or absent.

        Raises:
            SearchFolderError: as :meth:`check_free`.
            ResourceError: the folder cannot be written.
        """
        folder = cls.check_free(results_dir, config)
        try:
            (folder.root / "trials").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(
                f"{folder.root}: the results folder cannot be made: {error.strerror}. Choose a "
                "writable --results-dir"
            ) from error
        write_text(folder.root / "search.yaml", redact(source))  # its comments
        folder.save(config, uuid.uuid4().hex)
        return folder

    @classmethod
    def open(cls, results_dir: Path, name: str) -> Self:
        """An existing search's folder.

        Raises:
            SearchFolderError: it does not exist, its identity is unreadable, or it is of another
                version.
        """
        folder = cls(results_dir.absolute() / name)
        fetch(results_dir, name, "search.json")
        if SAFE_NAME.fullmatch(name) and _is_search(folder.root / "trials", is_folder=True):
            if not _is_search(folder.meta):
                raise SearchFolderError(
                    f"{folder.meta}: is missing or cannot be read, though the folder holds trials. "
                    "Bring it back from a copy, or give read access; it says what is searched"
                )
        elif not SAFE_NAME.fullmatch(name) or not _is_search(folder.meta):
            known = ", ".join(sorted(found.name for found in searches(results_dir))) or "none"
            raise SearchFolderError(
                f"{shown_place(results_dir)}: no search named {name!r} (there: {known}). Give its "
                "--results-dir if it lies elsewhere"
            )
        folder._refuse_foreign()
        if (layout := folder.identity()["layout"]) != LAYOUT:
            maker = "topotune 0.1.0" if layout < LAYOUT else "a newer topotune"
            raise SearchFolderError(
                f"{folder.root}: was made by {maker}, whose results folders this version does not "
                "read. Use that one to go on with it, or begin the search again with --name OTHER"
            )
        return folder

    def _refuse_foreign(self) -> None:
        """A folder from elsewhere must not make us read or write what lies outside of it, nor wait
        for a pipe without a writer."""
        for place, folders, files in os.walk(self.root):
            for name in (*folders, *files):
                path = Path(place, name)
                try:
                    mode = path.lstat().st_mode
                except FileNotFoundError:  # a living driver's, which replaces them
                    continue
                except OSError as error:
                    raise SearchFolderError(
                        f"{path}: cannot be looked at: {error.strerror}. Give this user access to "
                        "the whole folder"
                    ) from error
                if stat.S_ISLNK(mode):
                    raise SearchFolderError(
                        f"{path}: is a link, and a search's folder holds its own files only. "
                        "Put there what it points to"
                    )
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise SearchFolderError(
                        f"{path}: is a pipe, a socket or a device, and a search's folder holds "
                        "files and folders only. Remove it"
                    )

    def _is_stub(self) -> bool:
        """Whether there is only what a creation that was killed, or is under way, leaves."""
        for path in self.root.iterdir():
            empty = path.name == "trials" and path.is_dir() and not any(path.iterdir())
            begun = path.name.startswith("search.")  # search.json itself is not there
            if not (empty or path == self.lock or begun):
                return False
        return True

    def identity(self) -> dict[str, Any]:
        """The content of search.json."""
        try:
            data: dict[str, Any] = json.loads(self.meta.read_text(encoding="utf-8"))
            return {
                "layout": int(data.get("layout", 1)),
                "search_id": str(data["search_id"]),
                "config": dict(data["config"]),
            }
        except _UNREADABLE as error:
            raise SearchFolderError(f"{self.meta}: is damaged ({error})") from None

    @property
    def search_id(self) -> str:
        """The search's unique id, which its MLflow runs carry."""
        return str(self.identity()["search_id"])

    def config(self) -> SearchConfig:
        """The validated config as the search runs it now."""
        try:
            return parse_search(self.identity()["config"], str(self.meta), {}, saved=True)
        except ConfigError as error:
            raise SearchFolderError(
                f"{error}. Another version wrote it, or it was edited"
            ) from None

    def save(self, config: SearchConfig, search_id: str | None = None) -> None:
        """Write identity and config."""
        identity = {
            "layout": LAYOUT,
            "search_id": search_id or self.search_id,
            "config": config.model_dump(mode="json"),
        }
        write_text(self.meta, json.dumps(identity, indent=1) + "\n")


def searches(results_dir: Path) -> list[SearchFolder]:
    """All searches under a results directory, by name.

    Raises:
        ResourceError: it is an object store, and that cannot be asked.
    """
    if not results_dir.is_dir():
        return []
    there = fetch_searches(results_dir)
    return [
        SearchFolder(path.absolute())
        for path in sorted(results_dir.iterdir())
        if _is_search(path / "search.json") and (there is None or path.name in there)
    ]


def _is_search(path: Path, is_folder: bool = False) -> bool:
    """Whether a file (or folder) is there; one that may not be looked at is not."""
    try:
        return path.is_dir() if is_folder else path.is_file()
    except PermissionError:
        return False
