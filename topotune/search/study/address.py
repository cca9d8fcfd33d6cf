"""A study in a PostgreSQL database: how it is reached, and its name there."""

from __future__ import annotations

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from topotune.config.models import SearchConfig
from topotune.errors import ConfigError, ResourceError
from topotune.requirements import install_command
from topotune.search.place.folder import SearchFolder


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
