"""Where things are: environment variables, then a file ``topotune.toml`` in the current folder.

::

    address = "http://127.0.0.1:8265"                        # TOPOTUNE_ADDRESS: Ray's Jobs API
    storage = "/srv/topotune"                                # TOPOTUNE_STORAGE: the searches
    study_uri = "postgresql://topotune@127.0.0.1/topotune"   # TOPOTUNE_STUDY_URI
    tracking_uri = "http://127.0.0.1:5000"                   # MLFLOW_TRACKING_URI

The file stands in for variables that are not set, and is read once, by the command line: everything
else reads the environment. ``TOPOTUNE_CONFIG`` names a file elsewhere. It holds no passwords.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

from topotune.errors import ConfigError, did_you_mean
from topotune.redaction import redact

FILE = "topotune.toml"
FILE_VARIABLE = "TOPOTUNE_CONFIG"
ADDRESS = "TOPOTUNE_ADDRESS"
STORAGE = "TOPOTUNE_STORAGE"
STUDY_URI = "TOPOTUNE_STUDY_URI"
TRACKING_URI = "MLFLOW_TRACKING_URI"
VARIABLES = {
    "address": ADDRESS,
    "storage": STORAGE,
    "study_uri": STUDY_URI,
    "tracking_uri": TRACKING_URI,
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def apply_settings(folder: Path) -> None:
    """Set the variables that the settings file names and the environment does not.

    Args:
        folder: where ``topotune.toml`` is looked for, unless ``TOPOTUNE_CONFIG`` names one.

    Raises:
        ConfigError: the file is no TOML, or holds an unknown key or a bad value.
    """
    named = os.environ.get(FILE_VARIABLE)
    path = Path(named) if named else folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if named:
            raise ConfigError(FILE_VARIABLE, f"there is no file {named!r}") from None
        return
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {error}") from None
    for name, value in read_settings(text, path).items():
        os.environ.setdefault(VARIABLES[name], value)


def read_settings(text: str, path: Path) -> dict[str, str]:
    """The settings in a file's text; a relative storage folder is one beside the file.

    Raises:
        ConfigError: as :func:`apply_settings`.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), f"is no TOML: {error}") from None
    for name, value in data.items():
        if name not in VARIABLES:
            raise ConfigError(str(path), f"unknown key {name!r}{did_you_mean(name, VARIABLES)}")
        if not isinstance(value, str) or not value or "\0" in value:
            raise ConfigError(f"{path}: {name}", "must be a text that is not empty")
        if redact(value) != value:
            raise ConfigError(
                f"{path}: {name}",
                "holds a password, which a file in a project's folder must not",
                f"Put the whole address into the environment: {VARIABLES[name]}",
            )
    storage = data.get("storage")
    if storage is not None and "://" not in storage:
        data["storage"] = str(path.absolute().parent / Path(storage).expanduser())
    return data


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a file with a line ``NAME=value`` each; ``#`` begins a comment line.

    A value is taken as it stands; one pair of quotes around it is left out.

    Raises:
        ConfigError: it cannot be read, or a line is of another form; the line is not shown, since
            it may hold a secret.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {error}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        name, mark, value = line.removeprefix("export ").partition("=")
        name, value = name.strip(), value.strip()
        if not mark or not _NAME.fullmatch(name) or "\0" in value:
            raise ConfigError(f"{path}:{number}", "must be NAME=value, a comment or empty")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        found[name] = value
    return found
