"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from topotune.errors import ResourceError

_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENFILE),
    *(errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),  # a lost network mount
    *(errno.EACCES, errno.EPERM),
)


def disk_fault(error: BaseException, folder: Path) -> bool:
    """Whether an error is of the disk that a folder lies on, full, read-only or broken, and so
    would meet any other work there, too.

    Args:
        error: what was raised; where its file lies elsewhere or is unknown, it is not.
        folder: the folder.
    """
    if not isinstance(error, OSError) or error.errno not in _DISK:
        return False
    if not isinstance(error.filename, str | bytes):
        return False
    return Path(os.fsdecode(error.filename)).resolve().is_relative_to(folder.resolve())


def files_exhausted(error: BaseException) -> bool:
    """Whether an error, or the one behind it, is that this process has too many files open, which
    is the doing of what runs in it."""
    return any(
        isinstance(one, OSError) and one.errno == errno.EMFILE for one in (error, error.__cause__)
    )


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and force their names to disk: a power loss must not drop
    a new folder with all that was forced to disk in it.

    Raises:
        ResourceError: it cannot be created or written.
    """
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in reversed(new):
            with suppress(PermissionError):  # written to, and perhaps not readable
                sync_folder(path.parent)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise ResourceError(
            f"folder {folder}: cannot be created: {error}. Make space or choose a writable folder"
        ) from error
    if not writable:
        raise ResourceError(
            f"folder {folder}: not writable. Choose a folder that this user can write"
        )


def write_atomically(
    path: Path,
    content: bytes,
    keep: Path | None = None,
    fence: Callable[[], None] = lambda: None,
) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old or the new one.

    The content goes to a neighbour, is forced to disk, and then takes the name.

    Args:
        path: the file; its folder exists.
        content: all of it.
        keep: where the file's present version moves to, if it has one. A crash between the two
            renames leaves only ``keep``.
        fence: called last of all before the renames; what it raises leaves all as it was.

    Raises:
        OSError: the disk is full or the folder not writable; the old file is then untouched, and
            nothing of the new one takes up room. It names the file.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb", buffering=0) as file:
            put(file.fileno(), content)
        fence()
        if keep is not None and path.exists():
            path.replace(keep)
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(partial)  # a full disk's names none
        raise
    sync_folder(path.parent)


def append(path: Path, content: bytes, end: int, force: bool = True) -> None:
    """Append to a file that is made by its first bytes; its other contents stay as they are.

    Args:
        path: the file; its folder exists.
        content: what is appended, as a whole or not at all.
        end: how many bytes the file has. What lies behind them was not appended as a whole, and is
            cut off.
        force: whether all of the file is on disk when this returns.

    Raises:
        OSError: the disk is full, the folder not writable, or the file shorter than ``end``; it
            names the file, which then has ``end`` bytes as before.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | (os.O_CREAT if not end else 0), 0o666)
        try:
            size = os.fstat(handle).st_size
            if size < end:
                raise OSError(errno.EIO, f"it has {size} bytes of the {end} that were written")
            if size > end:
                os.ftruncate(handle, end)
            if not end:  # a name that is not on disk would lose all of it
                sync_folder(path.parent)
            try:
                put(handle, content, force)
            except BaseException:
                os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def put(handle: int, content: bytes, force: bool = True) -> None:
    """Write to an open file, and force it to disk. All that must survive a crash goes through here,
    where a test can count, fail or stop it.

    Raises:
        OSError: the disk is full or broken; some of the content may have been written.
    """
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]
    if force:
        os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, so that a new or renamed file is found after a crash.

    Raises:
        OSError: the folder cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
