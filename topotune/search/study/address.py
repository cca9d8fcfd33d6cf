"""Where a search's study is kept: a file of its folder, or a PostgreSQL database."""

from __future__ import annotations

import os

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from topotune.config.models import SearchConfig, StudyConfig
from topotune.errors import ConfigError, ResourceError
from topotune.requirements import install_command
from topotune.search.place.folder import STUDY_FILE, SearchFolder

ENVIRONMENT = "TOPOTUNE_STUDY_URI"
_SECRETS = ("password", "sslpassword")


def study_uri(config: SearchConfig) -> URL | None:
    """The study database of a search, password and all; None for the file of its folder.

    What the search names counts; the environment adds a password where it names the same one.

    Raises:
        ConfigError: the environment's address is not one of PostgreSQL.
    """
    if config.study.uri is None:
        return None
    named, given = make_url(config.study.uri), _environment()
    return given if given is not None and _place(given) == _place(named) else named


def remembered_study(config: SearchConfig) -> SearchConfig:
    """A new search with its study's address written down, wherever that was named; no secrets.

    Raises:
        ConfigError: the environment's address is not one of PostgreSQL.
    """
    given = _environment()
    if given is None or config.study.uri is not None:
        return config
    study = StudyConfig(uri=public(given))
    return config.model_copy(update={"study": study})


def public(url: URL) -> str:
    """An address that may be shown and kept: without password."""
    bare = url.difference_update_query(_SECRETS)
    return URL.create(
        bare.drivername,
        bare.username,
        host=bare.host,
        port=bare.port,
        database=bare.database,
        query=bare.query,
    ).render_as_string()


def study_place(folder: SearchFolder, config: SearchConfig) -> str:
    """Where the study is, in words for a person: a path, or an address without secrets."""
    url = study_uri(config)
    return str(folder.root / STUDY_FILE) if url is None else public(url)


def with_driver(url: URL) -> URL:
    """A PostgreSQL address with the package that speaks to the database.

    Raises:
        ConfigError: that package is not installed, or lacks PostgreSQL's client library.
    """
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "study.uri",
            f"PostgreSQL needs the package psycopg, which cannot be imported ({error})",
            f"Install it: {install_command('psycopg')}",
        ) from None
    return url.set(drivername="postgresql+psycopg")


def try_database(address: str) -> str:
    """Make sure that a database takes new tables; what it is, in words.

    Raises:
        ResourceError: it cannot be reached, or its user may not make tables.
        ConfigError: as :func:`with_driver`.
    """
    try:
        engine = create_engine(
            with_driver(make_url(address)), connect_args={"connect_timeout": 10}, poolclass=NullPool
        )
        with engine.connect() as connection:
            may = connection.execute(text("SELECT has_schema_privilege(current_schema, 'CREATE')"))
            if not may.scalar():
                raise ResourceError(
                    f"the user {engine.url.username!r} may not make tables in {engine.url.database}"
                )
            number = connection.execute(text("SHOW server_version")).scalar()
    except SQLAlchemyError as error:
        raise ResourceError(str(error)) from error
    return f"PostgreSQL {number} at {engine.url.host} can be written"


def study_name(folder: SearchFolder, config: SearchConfig) -> str:
    """Its name in the database, where other searches of that name may be."""
    return config.name if config.study.uri is None else f"{config.name}-{folder.search_id}"


def _environment() -> URL | None:
    named = os.environ.get(ENVIRONMENT) or None
    if named is None:
        return None
    problem = "" if named.startswith(("postgresql://", "postgresql+psycopg://")) else "its scheme"
    try:
        url = make_url(named)
    except ValueError:  # of a port that is no number; SQLAlchemy's text would show the address
        problem = "its form"
    if problem:
        raise ConfigError(
            ENVIRONMENT,
            f"{problem} is not that of a PostgreSQL address",
            "Write postgresql://USER:PASSWORD@HOST:PORT/DATABASE",
        )
    return url


def _place(url: URL) -> tuple[object, ...]:
    return url.host, url.port or 5432, url.database
