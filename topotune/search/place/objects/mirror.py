"""The driver's side of a search in a store: a thread brings what workers write, and sends what the
driver writes."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from topotune.errors import LeaseLostError, TopotuneError
from topotune.search.place.objects import layout
from topotune.search.place.objects.address import StoreAddress, shown_place, worker_folder
from topotune.search.place.objects.replica import Replica, bring
from topotune.search.place.objects.store import READER_SECONDS, ObjectStore
from topotune.search.ray.watchdog import GUARD_FILE
from topotune.search.view import Listener
from topotune.tracking.outbox import OUTBOX_FILE
from topotune.train.checkpoint import CHECKPOINT_FILE

EVERY_SECONDS = 3.0
"""Between two looks at what has changed; what a driver that is lost with its disk can lose of its
own records, all of which a resume makes again from the study."""
BYTES_PER_SECOND = 256 * 1024
"""A file that grows for days is sent whole each time, but not more often than this on average."""
FINISH_SECONDS, FINISH_SECONDS_HURRY = 60.0, 3.0
"""How long the last sending waits for a store that is away."""
_log = logging.getLogger(__name__)


class Mirror:
    """Keeps the folder here and the store alike while a driver works.

    Args:
        results_dir: the folder that stands for the address.
        address: the store.
        name: the search.
        listener: notified when the store is away for long.

    Attributes:
        chunked: the trials whose traces were not joined when the search was taken over.
    """

    def __init__(
        self, results_dir: Path, address: StoreAddress, name: str, listener: Listener
    ) -> None:
        self.address, self._name = address, name
        self.root, self._results_dir = results_dir / name, results_dir
        meanwhile = f"What is not saved there yet is kept in {self.root}"
        self._store = ObjectStore(address, listener.note, meanwhile=meanwhile)
        self._workers = worker_folder(address, name)
        self._replica = driver_replica(results_dir, name, self._store)
        self._live: Callable[[], Iterable[int]] = tuple
        self._gone: dict[str, None] = {}
        self._settled: set[int] = set()
        self.chunked: set[int] = set()
        self._again: dict[str, float] = {}
        self._changing = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost: LeaseLostError | None = None

    def open(self) -> None:
        """Take the search over in the store, and bring here what its last driver wrote.

        Raises:
            ResourceError: the store or the folder cannot be used.
        """
        files = [found for name in self._replica.open() if (found := layout.split_trial(name))]
        unsettled = {number for number, file in files if file == CHECKPOINT_FILE}
        self._settled = {number for number, _ in files} - unsettled
        self.chunked = {number for number, file in files if layout.is_chunk(file)}

    def begin(self, live: Callable[[], Iterable[int]]) -> None:
        """Send all that is here, and keep both alike from now on.

        Args:
            live: the trials that are under way.

        Raises:
            LeaseLostError: another driver has taken the search over in the store.
            ResourceError: the store cannot be used.
        """
        self._live = live
        self._replica.push()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def fetch(self, number: int, *names: str) -> None:
        """Bring these files of a trial; without names all that the driver needs, the crash note
        included."""
        store, home = ObjectStore(self.address, limit=READER_SECONDS), layout.trial_name(number)
        prefix, folder = f"{self._name}/{home}", self.root / home
        if names:
            bring(store, prefix, folder, names)
            return
        listing = store.objects(prefix)
        for path in folder.glob("*/*"):  # of a worker before, whose epochs were trained again
            name = path.relative_to(folder).as_posix()
            if layout.is_chunk(name) and name not in listing:
                path.unlink()
        wanted = (name for name in listing if layout.for_driver(name) or name == GUARD_FILE)
        bring(store, prefix, folder, wanted)
        note = self._workers / home / GUARD_FILE  # of a worker here that could not send it
        with contextlib.suppress(OSError):
            if note.stat().st_size:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(note, folder / GUARD_FILE)

    def forget(self, number: int, *names: str) -> None:
        """Delete a trial's files from the store, soon."""
        with self._changing:
            for name in names:
                if name == CHECKPOINT_FILE:
                    if number in self._settled:
                        continue  # every resume asks again for every trial
                    self._settled.add(number)
                self._gone[f"{layout.trial_name(number)}/{name}"] = None

    def worker_folder(self, number: int) -> Path:
        """Where a worker of this node keeps a trial."""
        return self._workers / layout.trial_name(number)

    def check(self) -> None:
        """Make sure that the search is ours in the store, as far as the last look there showed.

        Raises:
            LeaseLostError: another driver has taken it over.
        """
        if self._lost is not None:
            raise self._lost

    def _run(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            try:
                self._round()
            except LeaseLostError as error:
                self._lost = error  # the next check raises it
                return
            except Exception as error:  # noqa: BLE001 - the next round, or the end, tries again
                if not self._over.is_set():
                    _log.warning("%s", error)

    def _round(self) -> None:
        with self._changing:
            gone = list(self._gone)
        # What replaces these files goes first, such as the joined trace; and an ended trial's
        # checkpoint goes when the store has what was recorded of it.
        ended = {found[0] for name in gone if (found := layout.split_trial(name))}
        names = self._names(ended.union(self._live()))
        self._replica.push([*names, OUTBOX_FILE] if gone else names)
        self._delete(gone)

    def _names(self, numbers: Iterable[int]) -> list[str]:
        """The driver's files that may have changed: at the top and of some trials."""
        now = time.monotonic()
        names = []
        for path in self.root.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a half-written one that is renamed
                if path.is_file() and now >= self._again.get(path.name, 0.0):
                    self._again[path.name] = now + path.stat().st_size / BYTES_PER_SECOND
                    names.append(path.name)
        for home in map(layout.trial_name, numbers):
            if (self.root / home).is_dir():
                names += [f"{home}/{path.name}" for path in (self.root / home).iterdir()]
        return names

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._replica.forget(name)
            with self._changing:
                self._gone.pop(name, None)

    def finish(self, hurry: bool) -> str:
        """Send all that is left; what could not be sent and how to go on, empty if all is there.

        Args:
            hurry: whether it may take no more than a few seconds.

        Raises:
            LeaseLostError: another driver has taken the search over in the store.
        """
        self._store.limit = FINISH_SECONDS_HURRY if hurry else FINISH_SECONDS
        self._over.set()
        if self._thread is not None and not (hurry and self._store.trouble):
            self._thread.join(FINISH_SECONDS_HURRY if hurry else None)
        if hurry and self._store.trouble:  # a stop has no time to wait for it
            error = f"it is away: {self._store.trouble}"
        else:
            error = self._last(hurry)
        self.check()
        return error and (
            f"search {self._name!r}: not all of it is saved in {self.address}: {error}. The study "
            f"has every trial; pages, ledger and records for MLflow wait in {self.root}. When the "
            f"store is back, on this machine: topotune sync {self._name} --results-dir "
            f"{shown_place(self._results_dir)}"
        )

    def _last(self, hurry: bool) -> str:
        """Send and delete what is left; what went wrong, else empty."""
        errors = ["it does not answer"]

        def run() -> None:
            try:
                self._replica.push()
                self._delete(list(self._gone))
                errors.clear()
            except LeaseLostError as error:
                self._lost = error
            except (TopotuneError, OSError) as error:
                errors[:] = [str(error)]

        thread = threading.Thread(target=run, name="mirror end", daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS_HURRY + 1.0 if hurry else None)
        return "".join(errors)

    def close(self) -> None:
        """End, whatever is left: nothing more is written."""
        self._store.limit, self._store.stopping = 0.0, lambda: True
        self._over.set()
        if self._thread is not None and not self._store.trouble:
            self._thread.join(FINISH_SECONDS_HURRY)


def driver_replica(results_dir: Path, name: str, store: ObjectStore) -> Replica:
    """A search's folder and its copy in the store."""
    state = results_dir / ".state" / f"{name}.json"
    folder = results_dir / name
    return Replica(store, name, folder, state, layout.DRIVER_CLAIM, layout.of_driver)
