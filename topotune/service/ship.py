"""What goes to the cluster with a search: its file, and the user's own modules that it needs.

A search file names code by import path. Of the current folder, the module or package of each such
path goes along, and whatever of that folder these import in turn; the rest of the folder stays.
Nothing is run to find that out. Other files go along when they are named.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from topotune.errors import ConfigError
from topotune.repository import Repository
from topotune.search.code.shipped import (
    ENV_FILE,
    REPOSITORY_FILE,
    SEARCH_FILE,
    left_out,
    ship_env,
    size_of,
)
from topotune.search.code.usercode import import_paths, own_modules

MAX_BYTES = 100 * 2**20


def pack(
    target: Path,
    text: str,
    data: object,
    root: Path,
    include: Iterable[Path] = (),
    env_file: Path | None = None,
) -> list[str]:
    """Fill an empty folder with what a search needs; the top-level names that went along.

    Args:
        target: the folder.
        text: the search file's text.
        data: its content, searched for import paths.
        root: the user's folder, where modules are looked up.
        include: more files and folders.
        env_file: variables of the driver and its workers, ``NAME=value`` a line.

    Raises:
        ConfigError: a file is missing or unreadable, or all together is too large.
    """
    (target / SEARCH_FILE).write_text(text, encoding="utf-8")
    parts = {path.relative_to(root): path for path in own_modules(import_paths(data), root)}
    for path in include:
        whole = (root / path).absolute()
        if not whole.exists():
            raise ConfigError("--include", f"there is no {path}")
        parts[whole.relative_to(root) if whole.is_relative_to(root) else Path(whole.name)] = whole
    for place, path in parts.items():
        if str(place) in (SEARCH_FILE, ENV_FILE, REPOSITORY_FILE, "."):
            raise ConfigError("--include", f"{path} would replace the search file or the package")
        _copy(path, target / place)
    if (repository := Repository.of(root)) is not None:  # the cluster has no copy of it
        text = json.dumps(repository.to_dict(), indent=1)
        (target / REPOSITORY_FILE).write_text(text, encoding="utf-8")
    size = size_of(target)
    if size > MAX_BYTES:
        large = max(parts, key=lambda place: size_of(target / place))
        raise ConfigError(
            "submit",
            f"what would be shipped has {size / 2**20:.0f} MiB ({MAX_BYTES >> 20} allowed), most "
            f"of it in {large}",
            "Put data where the cluster's nodes see it, and code into a package without it",
        )
    if env_file is not None:
        ship_env(env_file, target)
    return sorted(str(place) for place in parts)


def _copy(path: Path, target: Path) -> None:
    for one in (path, *path.rglob("*")):
        if one.is_symlink():
            raise ConfigError(
                str(one),
                f"is a link to {one.readlink()}, which would be shipped and kept with the results",
                "Put the file itself there, or name what it points to by --include",
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, ignore=left_out, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target)
    except (OSError, shutil.Error) as error:
        raise ConfigError(str(path), f"cannot be packed: {error}") from None
