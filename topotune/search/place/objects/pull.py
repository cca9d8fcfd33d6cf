"""What commands that only look at a search bring from its store: as little as they need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from topotune.config.models import SAFE_NAME
from topotune.search.place.objects import layout
from topotune.search.place.objects.address import store_address

if TYPE_CHECKING:
    from topotune.search.place.objects.store import ObjectStore


def fetch(results_dir: Path, name: str, *files: str, trial: int | None = None) -> None:
    """Bring files of a search, if its results are in a store; what the store lacks goes here, too.

    On the machine that drove the search last the driver's files may be newer than the store's, and
    stay as they are.

    Args:
        results_dir: where the search lies.
        name: the search.
        files: relative to its folder; a whole folder's name ends with ``/``.
        trial: whose folder they are relative to instead.

    Raises:
        ResourceError: the store cannot be asked.
    """
    store = _open(results_dir)
    if store is None or not SAFE_NAME.fullmatch(name):
        return
    from topotune.search.place.objects.mirror import driver_replica
    from topotune.search.place.objects.replica import each

    results_dir = results_dir.absolute()
    ahead = driver_replica(results_dir, name, store).ahead
    home = "" if trial is None else f"{layout.trial_name(trial)}/"

    def one(file: str) -> None:
        path = results_dir / name / file
        if not store.download(f"{name}/{file}", path):
            path.unlink(missing_ok=True)

    wanted = []
    for file in (f"{home}{file}" for file in files):
        inside = store.objects(f"{name}/{file[:-1]}") if file.endswith("/") else [""]
        wanted += [found for inner in inside if layout.belongs(found := f"{file}{inner}")]
    each(one, [file for file in wanted if not (ahead and layout.of_driver(file))])


def fetch_searches(results_dir: Path) -> set[str] | None:
    """Bring the identity of every search of a store; their names, None of a mere folder.

    Raises:
        ResourceError: the store cannot be asked.
    """
    if (store := _open(results_dir)) is None:
        return None
    from topotune.search.place.objects.replica import each

    names = [name for name in store.folders() if SAFE_NAME.fullmatch(name)]
    each(lambda name: fetch(results_dir, name, "search.json"), names)
    return set(names)


def _open(results_dir: Path) -> ObjectStore | None:
    """The store that results are in; None of a mere folder, which needs none of its modules."""
    address = store_address(results_dir)
    if address is None:
        return None
    from topotune.search.place.objects.store import READER_SECONDS, ObjectStore

    return ObjectStore(address, limit=READER_SECONDS)
