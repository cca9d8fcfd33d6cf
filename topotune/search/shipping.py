"""The shipper of one session: which store it sends to, and one line on how it stands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from topotune.config import SearchConfig
from topotune.errors import ConfigError, LeaseLostError
from topotune.redaction import redact
from topotune.search.folder import SearchFolder
from topotune.search.view import Listener
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.shipper import Reconciliation, Shipper
from topotune.tracking.store import check_tracking_uri

CLOSE_SECONDS = 60.0
CLOSE_SECONDS_HURRY = 3.0
"""With a store that cannot be reached, or a search that was told to stop: the spools keep all."""


def tracking_uri(config: SearchConfig) -> str | None:
    """The tracking server of a search: its own setting, else MLFLOW_TRACKING_URI, else None for
    the embedded store.

    Raises:
        ConfigError: an address of a form that MLflow does not serve.
    """
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    return None if uri is None else check_tracking_uri(uri)


def check_addresses(config: SearchConfig, results_dir: Path) -> None:
    """Find an address that no store can have before anything is started or written.

    Raises:
        ConfigError: the tracking address, or a results path that no database address can express.
    """
    tracking_uri(config)
    for sign in "?%#":
        if sign in str(results_dir.absolute()):
            raise ConfigError(
                f"results folder {results_dir}",
                f"its path holds a {sign!r}, which a database address cannot express",
                "Choose another --results-dir",
            )


def remembered(config: SearchConfig) -> SearchConfig:
    """The search with its tracking server written down, wherever that was named.

    A later resume or sync from another shell must not send the records elsewhere. An address
    with a password in it is not written down.
    """
    uri = tracking_uri(config)
    if uri is None or config.tracking.uri is not None or redact(uri) != uri:
        return config
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


def open_store(folder: SearchFolder, config: SearchConfig) -> MlflowStore:
    """The store that a search is shipped to; nothing is contacted yet."""
    uri = tracking_uri(config)
    if uri is None:
        return MlflowStore.embedded(folder.root.parent, config.tracking.experiment)
    return MlflowStore(uri, config.tracking.experiment)


class Shipping:
    """Ships a search's spools while a session runs; never in the way of training.

    Args:
        folder: the search's folder.
        config: the search.
        listener: told once if the store cannot be reached.
    """

    def __init__(self, folder: SearchFolder, config: SearchConfig, listener: Listener) -> None:
        self._listener = listener
        self._name = config.name
        store = open_store(folder, config)
        self._label = store.label
        self._store = store
        self._shipper = Shipper(folder.root, store, folder.search_id, config.name)
        self._closed: Reconciliation | None = None
        self._warned = False

    def __enter__(self) -> Self:
        self._store.preload()
        self._shipper.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Aborted, or another driver's from here on: the spools keep what is not sent.
        if kind in (KeyboardInterrupt, LeaseLostError):
            self._shipper.close(0.0)
        else:
            self.close()

    def line(self) -> str:
        """How it stands; notes an outage once."""
        status = self._shipper.status()
        if not status.last_error:
            return f"MLflow: {status.shipped} of {status.recorded} items stored"
        if not self._warned:
            self._warned = True
            self._listener.note(
                f"warning: tracking store {redact(self._label)} cannot be reached: "
                f"{status.last_error}. The search goes on; its records are kept in the results "
                "folder and sent when the store is back"
            )
        return f"MLflow offline, {status.pending} items wait: {status.last_error}"

    def close(self, hurry: bool = False) -> str:
        """Send what is left, within bounds; one line on the final count.

        Args:
            hurry: the search was told to stop, and its process is soon to be gone.
        """
        if self._closed is None:
            hurry = hurry or bool(self._shipper.status().last_error)
            self._closed = self._shipper.close(CLOSE_SECONDS_HURRY if hurry else CLOSE_SECONDS)
        count = self._closed
        text = f"MLflow: {count.recorded} items recorded, {count.shipped} stored"
        if count.refused:
            text += f", {count.refused} refused (see refused.jsonl)"
        if count.pending:
            text += f", {count.pending} waiting: 'topotune sync {self._name}' sends them later"
        return text
