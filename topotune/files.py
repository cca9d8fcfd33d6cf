"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from topotune.errors import ResourceError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENFILE, errno.EMFILE)


def disk_fault(error: BaseException) -> bool:
    """Whether an error is the machine's and would meet any other work, too: a disk that is full,
    read-only or broken, or no more files to open."""
    return isinstance(error, OSError) and error.errno in _DISK


def make_folder(folder: Path) -> None:
    """Create a folder and its parents.

    Raises:
        ResourceError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise ResourceError(
            f"folder {folder}: cannot be created: {error}. Choose a folder that this user can write"
        ) from error
    if not writable:
        raise ResourceError(
            f"folder {folder}: not writable. Choose a folder that this user can write"
        )


def write_atomically(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old or the new one.

    The content goes to a neighbour, is forced to disk, and then takes the name.

    Args:
        path: the file; its folder exists.
        content: all of it.
        keep: where the file's present version moves to, if it has one. A crash between the two
            renames leaves only ``keep``.

    Raises:
        OSError: the disk is full or the folder not writable; the old file is then untouched.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if keep is not None and path.exists():
        path.replace(keep)
    partial.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
