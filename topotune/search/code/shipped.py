"""The folder that a search's driver starts in on a cluster: what is in it, and how it travels."""

from __future__ import annotations

import atexit
import io
import os
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

from topotune.errors import ConfigError, RunError
from topotune.settings import read_env_file

SEARCH_FILE = "search.yaml"
REPOSITORY_FILE = "topotune-repository.json"
"""How the git repository stood that the search was submitted from."""
ENV_FILE = ".topotune-env"
"""Variables of the driver and its workers. They may be secrets, so the file is not kept with the
results. Ray holds the package that it lies in as long as the job, and unpacked on each node until
it needs the room."""


def left_out(folder: str, names: list[str]) -> set[str]:
    """For ``shutil.copytree``: hidden files, which may hold secrets, and what Python compiled."""
    return {name for name in names if name.startswith(".") or name == "__pycache__"}


def ship_env(source: Path, package: Path) -> None:
    """Put a file of variables into a package, for its owner's eyes only.

    Raises:
        ConfigError: it cannot be read, or a line of it is of another form.
    """
    variables = read_env_file(source)
    handle = os.open(package / ENV_FILE, os.O_WRONLY | os.O_CREAT, 0o600)
    with open(handle, "w", encoding="utf-8") as file:  # noqa: PTH123 - of a descriptor
        file.writelines(f"{name}={value}\n" for name, value in variables.items())


def load_env(folder: Path) -> None:
    """Take the shipped variables over, if there are any.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = folder / ENV_FILE
    if path.is_file():
        os.environ.update(read_env_file(path))


def await_env() -> None:
    """Take over what was shipped with the search, from the folder that the process started in.

    Once: later that folder is another one. Nodes that share a machine replace each other's package
    while they unpack it, so that it may be gone for a moment.
    """
    for left in range(10, -1, -1):
        try:
            load_env(Path.cwd())
        except (OSError, ConfigError):
            if not left:
                raise
            time.sleep(0.2)
        else:
            return


def own_copy(package: Path) -> None:
    """Go on in a copy of the package, which goes with this process.

    Where several nodes share a machine and its temporary folder, each that unpacks the package
    takes it away from the others first.
    """
    if not (package / SEARCH_FILE).is_file():
        return  # a command without a package
    folder = Path(tempfile.mkdtemp(prefix="topotune-package-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(package, folder, ignore=left_out, dirs_exist_ok=True)
    os.chdir(folder)


def keep_code(source: Path, target: Path) -> None:
    """Copy what was shipped beside a search's results, so that a resume has the same code."""
    shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def to_archive(folder: Path) -> bytes:
    """A folder's content as a compressed tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in sorted(folder.rglob("*")):
            archive.add(path, str(path.relative_to(folder)), recursive=False)
    return buffer.getvalue()


def from_archive(content: bytes, folder: Path) -> None:
    """Unpack what :func:`to_archive` made; nothing in it can lie outside of ``folder``.

    Raises:
        RunError: it is damaged, or would write elsewhere.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            archive.extractall(folder, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise RunError(f"{folder}: what the cluster sent cannot be unpacked: {error}") from None
