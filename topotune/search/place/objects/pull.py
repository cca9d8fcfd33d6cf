"""What commands that only look at a search bring from its store: as little as they need."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from topotune.config.models import SAFE_NAME
from topotune.search.place.objects import layout
from topotune.search.place.objects.address import store_address
from topotune.search.place.objects.mirror import driver_replica
from topotune.search.place.objects.replica import each
from topotune.search.place.objects.store import READER_SECONDS, ObjectStore


def fetch_search(results_dir: Path, name: str) -> None:
    """Bring a search's identity and ledger, as :func:`fetch_files`."""
    fetch_files(results_dir, name, "search.json", "ledger.json")


def fetch_files(results_dir: Path, name: str, *files: str) -> None:
    """Bring files that a search's driver writes, if its results are in a store and they are there.

    What this machine itself wrote last is here already, and may be newer.

    Raises:
        ResourceError: the store cannot be asked.
    """
    address = store_address(results_dir)
    if address is None or not SAFE_NAME.fullmatch(name):
        return
    store = ObjectStore(address, limit=READER_SECONDS)
    if not driver_replica(results_dir.absolute(), name, store).ahead:
        _bring(store, results_dir, (f"{name}/{file}" for file in files))


def _bring(store: ObjectStore, results_dir: Path, files: Iterable[str]) -> None:
    """Bring files of a results folder; here, too, those are gone that the store lacks."""

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
    address = store_address(results_dir)
    if address is None:
        return None
    store = ObjectStore(address, limit=READER_SECONDS)
    names = [name for name in store.folders() if SAFE_NAME.fullmatch(name)]
    each(lambda name: fetch_search(results_dir, name), names)
    return set(names)


def fetch_folder(results_dir: Path, name: str, folder: str) -> None:
    """Bring a folder of a search (``code``, ``sources``), if its results are in a store.

    Raises:
        ResourceError: the store cannot be asked.
    """
    address = store_address(results_dir)
    if address is None:
        return
    store = ObjectStore(address, limit=READER_SECONDS)
    files = [file for file in store.objects(f"{name}/{folder}") if layout.belongs(file)]
    _bring(store, results_dir, (f"{name}/{folder}/{file}" for file in files))


def fetch_trial(results_dir: Path, name: str, number: int, *files: str) -> None:
    """Bring files of a trial, if its results are in a store; not the driver's to its own machine,
    where they may be newer.

    Raises:
        ResourceError: the store cannot be asked.
    """
    address = store_address(results_dir)
    if address is None:
        return
    store = ObjectStore(address, limit=READER_SECONDS)
    driver = driver_replica(results_dir.absolute(), name, store)
    home = f"{name}/{layout.trial_name(number)}"
    wanted = [file for file in files if layout.of_worker(file) or not driver.ahead]
    _bring(store, results_dir, (f"{home}/{file}" for file in wanted))
