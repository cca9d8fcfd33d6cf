"""Where a search keeps its study and its records: addresses, whose passwords stand in the
environment alone and never in what is saved or shown."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sqlalchemy.engine import URL, make_url

from topotune.config.models import SearchConfig
from topotune.errors import ConfigError
from topotune.redaction import SHORTEST, redact
from topotune.search.place.folder import STUDY_FILE, SearchFolder
from topotune.settings import STUDY_URI, TRACKING_URI
from topotune.tracking.store import DEFAULT_EXPERIMENT, check_tracking_uri

EXPERIMENT = "MLFLOW_EXPERIMENT_NAME"
_HIDDEN = "***"
_PORTS = {"http": 80, "https": 443, "postgresql": 5432}
_SECRETS = ("password", "sslpassword")


def study_uri(config: SearchConfig) -> URL | None:
    """The study database of a search, password and all; None for the file of its folder.

    What the search names counts; the environment adds a password where it names the same one.

    Raises:
        ConfigError: the environment's address is not one of PostgreSQL.
    """
    if config.study.uri is None:
        return None
    named, given = make_url(config.study.uri), _named_study()
    same = given is not None and _server(public_study(given)) == _server(config.study.uri)
    return given if same else named


def tracking_uri(config: SearchConfig) -> str | None:
    """The tracking server of a search, password and all; None for the embedded store.

    What the search names counts; MLFLOW_TRACKING_URI adds user and password where it names the
    same place, and names the server of a search that names none.

    Raises:
        ConfigError: an address of a form that MLflow does not serve, or one whose user and
            password are needed and that the environment does not name.
    """
    named, given = config.tracking.uri, os.environ.get(TRACKING_URI) or None
    if named is None:
        return None if given is None else check_tracking_uri(given)
    if given is not None and _HIDDEN not in given:
        server = _server(public(given))
        if server is not None and server == _server(named):
            return check_tracking_uri(given)
    if _HIDDEN in named:
        found = "is not set" if given is None else f"names {public(given)}"
        raise ConfigError(
            TRACKING_URI,
            f"{found}, and the records of search {config.name!r} are sent to {named}, whose "
            "secrets are not written down",
            f"Set {TRACKING_URI} to {named}, with what belongs in place of {_HIDDEN}",
        )
    return check_tracking_uri(named)


def experiment(config: SearchConfig) -> str:
    """The MLflow experiment of a search: what it names, else what the environment does."""
    return config.tracking.experiment or os.environ.get(EXPERIMENT) or DEFAULT_EXPERIMENT


def remembered(config: SearchConfig) -> SearchConfig:
    """The search with its study, tracking server and experiment written down, no matter where they
    were named; no secrets.

    A later resume or sync from another shell must not look or send elsewhere.

    Raises:
        ConfigError: as :func:`study_uri` and :func:`tracking_uri`.
    """
    uri, tracking = tracking_uri(config), {"experiment": experiment(config)}
    if uri is not None and uri != config.tracking.uri:
        tracking["uri"] = public(uri)
    study = {}
    if config.study.uri is None and (given := _named_study()) is not None:
        study["uri"] = public_study(given)
    return config.model_copy(
        update={
            "tracking": config.tracking.model_copy(update=tracking),
            "study": config.study.model_copy(update=study),
        }
    )


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


def study_place(folder: SearchFolder, config: SearchConfig) -> str:
    """Where the study is, in words for a person: a path, or an address without secrets."""
    url = study_uri(config)
    return str(folder.root / STUDY_FILE) if url is None else public_study(url)


def public_study(url: URL) -> str:
    """A database's address that may be shown and kept: without password, its user included."""
    return url.difference_update_query(_SECRETS)._replace(password=None).render_as_string()


def public(uri: str) -> str:
    """A server's address that may be shown and kept: ``***`` in place of its secrets.

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


def _named_study() -> URL | None:
    """The study database that the environment names."""
    named = os.environ.get(STUDY_URI) or None
    if named is None:
        return None
    problem = "" if named.startswith(("postgresql://", "postgresql+psycopg://")) else "its scheme"
    try:
        url = make_url(named)
    except ValueError:  # of a port that is no number; SQLAlchemy's text would show the address
        problem = "its form"
    if problem:
        raise ConfigError(
            STUDY_URI,
            f"{problem} is not that of a PostgreSQL address",
            "Write postgresql://USER:PASSWORD@HOST:PORT/DATABASE",
        )
    return url


def _server(uri: str) -> tuple[object, ...] | None:
    """What two public addresses of one server have in common; None of what is no address."""
    try:
        parts = urlsplit(uri)
        scheme = parts.scheme.partition("+")[0]
        port = parts.port or _PORTS.get(scheme)
    except ValueError:
        return None
    return (scheme, parts.hostname, port, parts.path.rstrip("/"))
