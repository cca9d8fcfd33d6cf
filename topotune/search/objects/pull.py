"""What commands that only look at a search bring from its store: as little as they need."""

from __future__ import annotations

from pathlib import Path

from topotune.config import SAFE_NAME
from topotune.search.objects import layout
from topotune.search.objects.address import store_address
from topotune.search.objects.mirror import driver_replica
from topotune.search.objects.replica import each
from topotune.search.objects.store import READER_SECONDS, ObjectStore

_IDENTITY = ("search.json", "ledger.json")


def fetch_search(results_dir: Path, name: str) -> None:
    """Bring a search's identity and ledger, if its results are in a store and it is there.

    What this machine itself wrote last is here already, and may be newer.

    Raises:
        ResourceError: the store cannot be asked.
    """
    address = store_address(results_dir)
    if address is None or not SAFE_NAME.fullmatch(name):
        return
    store = ObjectStore(address, limit=READER_SECONDS)
    if driver_replica(results_dir.absolute(), name, store).ahead:
        return

    def one(file: str) -> None:
        path = results_dir.absolute() / name / file
        if not store.download(f"{name}/{file}", path):
            path.unlink(missing_ok=True)  # a search that others have removed

    each(one, list(_IDENTITY))


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

    def one(file: str) -> None:
        store.download(f"{name}/{folder}/{file}", results_dir.absolute() / name / folder / file)

    each(one, files)


def fetch_trial(results_dir: Path, name: str, number: int, *files: str) -> None:
    """Bring files of a trial, if its results are in a store.

    Raises:
        ResourceError: the store cannot be asked.
    """
    address = store_address(results_dir)
    if address is None:
        return
    store = ObjectStore(address, limit=READER_SECONDS)
    home, root = layout.trial_name(number), results_dir.absolute() / name

    def one(file: str) -> None:
        if not store.download(f"{name}/{home}/{file}", root / home / file):
            (root / home / file).unlink(missing_ok=True)

    each(one, list(files))
