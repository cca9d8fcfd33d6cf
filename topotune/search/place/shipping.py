"""The shipper of one session: which store it sends to, and one line on how it stands."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from topotune.config.models import SearchConfig
from topotune.errors import ConfigError, LeaseLostError, TopotuneError
from topotune.redaction import SHORTEST, redact
from topotune.search.place.folder import SearchFolder
from topotune.search.view import Listener
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.shipper import Shipper, ShipStatus
from topotune.tracking.store import DEFAULT_EXPERIMENT, check_tracking_uri

ENVIRONMENT = "MLFLOW_TRACKING_URI"
EXPERIMENT = "MLFLOW_EXPERIMENT_NAME"
_HIDDEN = "***"
_PORTS = {"http": 80, "https": 443}
CLOSE_SECONDS = 60.0
CLOSE_SECONDS_HURRY = 3.0
"""With a store that cannot be reached, or a search that was told to stop: the outbox keeps all."""


def tracking_uri(config: SearchConfig) -> str | None:
    """The tracking server of a search, password and all; None for the embedded store.

    What the search names counts; MLFLOW_TRACKING_URI adds user and password where it names the
    same place, and names the server of a search that names none.

    Raises:
        ConfigError: an address of a form that MLflow does not serve, or one whose user and
            password are needed and that the environment does not name.
    """
    named, given = config.tracking.uri, os.environ.get(ENVIRONMENT) or None
    if named is None:
        return None if given is None else check_tracking_uri(given)
    if given is not None and _HIDDEN not in given and _place(public(given)) == _place(named):
        return check_tracking_uri(given)
    if _HIDDEN in named:
        found = "is not set" if given is None else f"names {public(given)}"
        raise ConfigError(
            ENVIRONMENT,
            f"{found}, and the records of search {config.name!r} are sent to {named}, whose "
            "secrets are not written down",
            f"Set {ENVIRONMENT} to {named}, with what belongs in place of {_HIDDEN}",
        )
    return check_tracking_uri(named)


def experiment(config: SearchConfig) -> str:
    """The MLflow experiment of a search: what it names, else what the environment does."""
    return config.tracking.experiment or os.environ.get(EXPERIMENT) or DEFAULT_EXPERIMENT


def look_first(folder: SearchFolder, config: SearchConfig, note: Callable[[str], None]) -> None:
    """Say before seconds of checks what a person may want to mend about where records go.

    Args:
        folder: the search's folder, which need not exist yet.
        config: the search, as :func:`remembered` gives it.
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


def public(uri: str) -> str:
    """An address that may be shown and kept: ``***`` in place of its secrets.

    The same one whatever its password is: of an address as ``http://mlflow:mlflow@mlflow/`` the
    host must not be hidden.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return redact(uri)
    login, at, place = rest.rpartition("@")
    host, question, query = place.partition("?")
    password = unquote(login.partition(":")[2])
    if len(password) < SHORTEST or password not in host:
        host = redact(host)
    return f"{scheme}://{_HIDDEN if at else ''}{at}{host}{redact(question + query)}"


def _place(uri: str) -> tuple[object, ...] | None:
    """What two public addresses of one server have in common; None of what is no address."""
    try:
        parts = urlsplit(uri)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return None
    return (parts.scheme, parts.hostname, port, parts.path.rstrip("/"))


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
    """The search with its tracking server and experiment written down, wherever these were named;
    no secrets.

    A later resume or sync from another shell must not send the records elsewhere.
    """
    uri, changes = tracking_uri(config), {"experiment": experiment(config)}
    if uri is not None and uri != config.tracking.uri:
        changes["uri"] = public(uri)
    tracking = config.tracking.model_copy(update=changes)
    return config.model_copy(update={"tracking": tracking})


def open_store(folder: SearchFolder, config: SearchConfig) -> MlflowStore:
    """The store that a search is shipped to; nothing is contacted yet."""
    uri = tracking_uri(config)
    if uri is None:
        return MlflowStore.embedded(folder.root.parent, experiment(config))
    return MlflowStore(uri, experiment(config))


def default_server() -> MlflowStore | None:
    """The tracking server that the environment names; None where it names none."""
    uri = os.environ.get(ENVIRONMENT) or None
    return (
        None if uri is None else MlflowStore(uri, os.environ.get(EXPERIMENT) or DEFAULT_EXPERIMENT)
    )


class Shipping:
    """Ships a search's outbox while a session runs; never in the way of training.

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
