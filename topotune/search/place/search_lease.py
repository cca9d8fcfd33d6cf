"""The lease of a search wherever its results are, and what comes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from topotune.config.models import SearchConfig
from topotune.errors import ConfigError
from topotune.search.place.addresses import study_place, study_uri, tracking_uri
from topotune.search.place.folder import SearchFolder
from topotune.search.place.lease import FileLease, Lease, lease_holder
from topotune.search.place.objects.address import StoreAddress, store_address
from topotune.search.place.objects.files import TrialFiles
from topotune.search.study.database import OPENING_SECONDS
from topotune.search.study.patience import Patience
from topotune.search.view import Listener
from topotune.settings import STUDY_URI, TRACKING_URI

if TYPE_CHECKING:
    from topotune.search.place.objects.mirror import Mirror


class SearchLease:
    """Held between ``__enter__`` and ``__exit__``: the lease in the folder here and, for a search
    in an object store, the one in the study's database and the claim in the store.

    Args:
        folder: the search's folder here.
        config: the search, its study's address written down.
        listener: notified of what is waited for.

    Attributes:
        files: those of the trials.
    """

    def __init__(self, folder: SearchFolder, config: SearchConfig, listener: Listener) -> None:
        self._leases: list[Lease] = [FileLease(folder.lock, listener.note)]
        self._mirror: Mirror | None = None
        self._stack = ExitStack()
        address = store_address(folder.root.parent)
        if address is not None:  # a folder's driver needs none of these modules
            from topotune.search.place.objects.mirror import Mirror
            from topotune.search.place.row_lease import RowLease

            check_stores(address, config)
            url = study_uri(config)
            assert url is not None  # check_stores() refuses a study without
            patience = Patience(study_place(folder, config), listener.note, OPENING_SECONDS)
            self._leases.append(RowLease(url, f"{address.place}/{folder.name}", patience))
            self._mirror = Mirror(folder.root.parent, address, folder.name, listener)
        self.files = TrialFiles(folder, self._mirror)

    def __enter__(self) -> Self:
        """Acquire them all.

        Raises:
            SearchFolderError: another process drives the search.
            ResourceError: the folder, the database or the store cannot be used.
        """
        with ExitStack() as stack:
            for lease in self._leases:
                stack.enter_context(lease)
            if self._mirror is not None:
                stack.callback(self._mirror.close)
                self._mirror.open()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check(self) -> None:
        """Make sure that the search is still ours; asked before every change.

        Raises:
            LeaseLostError: another driver has taken it over.
            ResourceError: it cannot be found out.
        """
        for lease in self._leases:
            lease.check()
        if self._mirror is not None:
            self._mirror.check()

    def begin(self, live: Callable[[], Iterable[int]] = tuple) -> None:
        """Save what is here, and go on doing so.

        Args:
            live: the trials that are under way.

        Raises:
            LeaseLostError, ResourceError: as :meth:`check`, or the store is away.
        """
        if self._mirror is not None:
            self._mirror.begin(live)

    def finish(self, hurry: bool) -> str:
        """Save what is left, within seconds where there is hurry; what could not be saved and how
        to go on, empty if all is.

        Raises:
            LeaseLostError: another driver has taken the search over.
        """
        return "" if self._mirror is None else self._mirror.finish(hurry)


def holder(folder: SearchFolder, config: SearchConfig) -> str | None:
    """Who drives a search ("pid 12 on host"); None where it is not driven.

    Raises:
        ResourceError: it cannot be found out.
    """
    address, url = store_address(folder.root.parent), study_uri(config)
    if address is None or url is None:
        return lease_holder(folder.lock)
    from topotune.search.place.row_lease import row_holder

    return row_holder(url, f"{address.place}/{folder.name}")


def check_stores(address: StoreAddress, config: SearchConfig) -> None:
    """Make sure that what goes with results in an object store is not in files of one machine.

    Raises:
        ConfigError: the study or the tracking store is.
    """
    if study_uri(config) is None:
        raise ConfigError(
            f"results address {address}",
            "an object store holds no study file, which is changed in place",
            f"Name a PostgreSQL database: study.uri, or {STUDY_URI}=postgresql://USER:PASSWORD@HOST/DB",
        )
    uri = tracking_uri(config)
    if uri is None or uri.startswith(("sqlite:", "file:")):
        raise ConfigError(
            f"results address {address}",
            "MLflow's embedded store is a file of one machine, and an object store holds none "
            "that is changed in place",
            f"Name a tracking server: tracking.uri, or {TRACKING_URI}=http://HOST:5000",
        )
