"""The search files that come with topotune, and how a command finds one by its name."""

from __future__ import annotations

import difflib
from pathlib import Path

from topotune.errors import ConfigError

SCHEMA_FILE = "search.schema.json"
"""The JSON schema beside the shipped files, which each of them names for editors."""


def shipped_folder() -> Path:
    """Where the shipped files lie: inside the package of a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "search_spaces"
    return inside if inside.is_dir() else package.parent / "search_spaces"


def shipped_spaces() -> dict[str, Path]:
    """The shipped search files by name, sorted."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def near_files(path: Path) -> list[str]:
    """The search file beside a missing one that was probably meant; empty where none is like it."""
    folder = path.parent if path.parent.is_dir() else Path()
    files = {file.name: str(folder / file.name) for file in folder.glob("*.yaml")}
    return [files[name] for name in difflib.get_close_matches(path.name, files, n=1)]


def find_space(given: str) -> Path:
    """The search file that a command was given: a path, or else the name of a shipped one.

    Raises:
        ConfigError: there is neither.
    """
    path, shipped = Path(given), shipped_spaces()
    if path.exists() and not (path.is_dir() and given in shipped):
        return path
    if given in shipped:
        return shipped[given]
    wanted = near_files(path) + difflib.get_close_matches(path.stem, shipped, n=1)
    raise ConfigError(
        given,
        "there is no such file, and no search file of that name is shipped"
        + (f"; did you mean {' or '.join(map(repr, wanted))}?" if wanted else ";")
        + " 'topotune spaces' lists those that are",
    )


def copy_spaces(folder: Path) -> list[Path]:
    """Copy the shipped files and their schema into a folder, which is made if it is missing.

    Returns:
        The copies. Files that are there already with the same content stay.

    Raises:
        ConfigError: a file of the same name has another content; nothing is copied then.
        OSError: the folder cannot be made or written.
    """
    sources = [*shipped_spaces().values(), shipped_folder() / SCHEMA_FILE]
    if folder.exists() and not folder.is_dir():
        raise ConfigError("--copy", f"{folder} is a file, not a folder")
    copies = {folder / source.name: source.read_bytes() for source in sources}
    changed = [str(p) for p, raw in copies.items() if p.exists() and p.read_bytes() != raw]
    if changed:
        raise ConfigError(
            "--copy", f"would overwrite {', '.join(changed)}", "Move them or name another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path, raw in copies.items():
        path.write_bytes(raw)
    return list(copies)
