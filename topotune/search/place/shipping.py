"""The shipper of one session: which store it sends to, and one line on how it stands."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Self

from topotune.config.models import SearchConfig
from topotune.errors import LeaseLostError, TopotuneError
from topotune.redaction import redact
from topotune.search.place.addresses import EXPERIMENT, experiment, tracking_uri
from topotune.search.place.folder import SearchFolder
from topotune.search.view import Listener
from topotune.settings import TRACKING_URI
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.shipper import Shipper, ShipStatus
from topotune.tracking.store import DEFAULT_EXPERIMENT

CLOSE_SECONDS = 60.0
CLOSE_SECONDS_HURRY = 3.0
"""With a store that cannot be reached, or a search that stops early: the outbox keeps all."""


def look_first(folder: SearchFolder, config: SearchConfig, note: Callable[[str], None]) -> None:
    """Say before seconds of checks what a person may want to mend about where records go.

    Args:
        folder: the search's folder, which need not exist yet.
        config: the search, as :func:`topotune.search.place.addresses.remembered` gives it.
        note: gets a line about a tracking server that does not answer, and about variables of
            MLflow that do not count.
    """
    own, given = experiment(config), os.environ.get(EXPERIMENT)
    if given and given != own:
        note(f"{EXPERIMENT} is {given!r}; {config.name} is recorded in its own experiment, {own!r}")
    if os.environ.get("MLFLOW_EXPERIMENT_ID"):
        note(
            "MLFLOW_EXPERIMENT_ID does not count here: an experiment is chosen by its name "
            f"(tracking.experiment, {EXPERIMENT}); this one is {own!r}"
        )
    store = open_store(folder, config)
    if store.artifacts is not None:
        return
    try:
        store.look()
    except TopotuneError as error:
        note(
            f"warning: tracking store {redact(store.label)} does not answer: {error}. If its "
            "address is wrong, stop now and mend it; else the records wait in the results folder "
            "until it does"
        )


def open_store(folder: SearchFolder, config: SearchConfig) -> MlflowStore:
    """The store that a search is shipped to; nothing is contacted yet."""
    uri = tracking_uri(config)
    if uri is None:
        return MlflowStore.embedded(folder.root.parent, experiment(config))
    return MlflowStore(uri, experiment(config))


def default_server() -> MlflowStore | None:
    """The tracking server that the environment names; None where it names none."""
    uri = os.environ.get(TRACKING_URI) or None
    return (
        None if uri is None else MlflowStore(uri, os.environ.get(EXPERIMENT) or DEFAULT_EXPERIMENT)
    )


class Shipping:
    """Ships a search's outbox while a session runs; never in the way of training.

    Args:
        folder: the search's folder.
        config: the search.
        listener: notified once if the store cannot be reached.
    """

    def __init__(self, folder: SearchFolder, config: SearchConfig, listener: Listener) -> None:
        self._listener, self._name = listener, config.name
        self._store = open_store(folder, config)
        self._shipper = Shipper(folder.root, self._store, folder.search_id, config.name)
        self._closed: ShipStatus | None = None
        self._warned = False

    def __enter__(self) -> Self:
        self._store.preload()
        self._shipper.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Aborted, or another driver's from here on: the outbox keeps what is not sent.
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
                f"warning: tracking store {redact(self._store.label)} cannot be reached: "
                f"{status.last_error}. The search goes on; its records are kept in the results "
                "folder and sent when the store is back"
            )
        return f"MLflow offline, {status.pending} items wait: {status.last_error}"

    def close(self, hurry: bool = False) -> str:
        """Send what is left, within bounds; one line on the final count.

        Args:
            hurry: the search stops early, and its process is soon to be gone.
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
