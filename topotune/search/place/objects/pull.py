"""What commands that only look at a search bring from its store: as little as they need."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from topotune.config.models import SAFE_NAME
from topotune.search.place.objects import layout
from topotune.search.place.objects.address import store_address

if TYPE_CHECKING:
    from topotune.search.place.objects.store import ObjectStore


def _open(results_dir: Path) -> ObjectStore | None:
    """The store that results are in; None of a mere folder, which needs none of its modules."""
    address = store_address(results_dir)
    if address is None:
        return None
    from topotune.search.place.objects.store import READER_SECONDS, ObjectStore

    return ObjectStore(address, limit=READER_SECONDS)


def _ahead(results_dir: Path, name: str, store: ObjectStore) -> bool:
    """Whether this machine drove the search last, so that its files may be newer here."""
    from topotune.search.place.objects.mirror import driver_replica

    return driver_replica(results_dir.absolute(), name, store).ahead


def fetch_search(results_dir: Path, name: str) -> None:
    """Bring a search's identity, as :func:`fetch_files`."""
    fetch_files(results_dir, name, "search.json")


def fetch_files(results_dir: Path, name: str, *files: str) -> None:
    """Bring files that a search's driver writes, if its results are in a store and they are there.

    What this machine itself wrote last is here already, and may be newer.

    Raises:
        ResourceError: the store cannot be asked.
    """
    store = _open(results_dir)
    if store is None or not SAFE_NAME.fullmatch(name) or _ahead(results_dir, name, store):
        return
    _bring(store, results_dir, (f"{name}/{file}" for file in files))


def _bring(store: ObjectStore, results_dir: Path, files: Iterable[str]) -> None:
    """Bring files of a results folder; here, too, those are gone that the store lacks."""
    from topotune.search.place.objects.replica import each

    def one(file: str) -> None:
        path = results_dir.absolute() / file
        if not store.download(file, path):
            path.unlink(missing_ok=True)

    each(one, list(files))


def fetch_searches(results_dir: Path) -> set[str] | None:
    """Bring the identity of every search of a store; their names, None of a mere folder.

    Raises:
        ResourceError: the store cannot be asked.
    """
    if (store := _open(results_dir)) is None:
        return None
    from topotune.search.place.objects.replica import each

    names = [name for name in store.folders() if SAFE_NAME.fullmatch(name)]
    each(lambda name: fetch_search(results_dir, name), names)
    return set(names)


def fetch_folder(results_dir: Path, name: str, folder: str) -> None:
    """Bring a folder of a search (``code``, ``sources``), if its results are in a store.

    Raises:
        ResourceError: the store cannot be asked.
    """
    if (store := _open(results_dir)) is None:
        return
    files = [file for file in store.objects(f"{name}/{folder}") if layout.belongs(file)]
    _bring(store, results_dir, (f"{name}/{folder}/{file}" for file in files))


def fetch_trial(results_dir: Path, name: str, number: int, *files: str) -> None:
    """Bring files of a trial, if its results are in a store; not the driver's to its own machine,
    where they may be newer.

    Raises:
        ResourceError: the store cannot be asked.
    """
    if (store := _open(results_dir)) is None:
        return
    ahead = _ahead(results_dir, name, store)
    home = f"{name}/{layout.trial_name(number)}"
    wanted = [file for file in files if layout.of_worker(file) or not ahead]
    _bring(store, results_dir, (f"{home}/{file}" for file in wanted))
