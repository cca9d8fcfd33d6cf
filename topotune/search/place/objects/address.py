"""Addresses of object stores, and the folders here that stand for them."""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from topotune.errors import ConfigError, ResourceError
from topotune.files import write_atomically

SCRATCH = "TOPOTUNE_SCRATCH"
_OPTIONS = {
    "s3": ("region", "scheme", "endpoint_override", "tls_ca_file_path"),
    "gs": ("scheme", "endpoint_override", "retry_limit_seconds"),
}
_MARK = "address"
_DIGITS = 12


@dataclass(frozen=True)
class StoreAddress:
    """Where in which store searches lie.

    Attributes:
        scheme: "s3" or "gs".
        bucket: the bucket.
        prefix: below it, without slashes at its ends; may be empty.
        options: of the connection, such as ``endpoint_override`` for MinIO.
    """

    scheme: str
    bucket: str
    prefix: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take an address apart.

        Raises:
            ConfigError: it is not an address, holds secrets, or has an unknown option.
        """
        place = f"results address {text.partition('://')[0]}://..."
        fix = "Write s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
        try:
            parts = urlsplit(text)
            known = _OPTIONS.get(parts.scheme)
            login = parts.username is not None or parts.password is not None
        except ValueError:
            raise ConfigError(place, "is not an address", fix) from None
        if known is None:
            raise ConfigError(place, f"must begin with s3:// or gs:// (got {parts.scheme}://)", fix)
        if login:
            # It would be kept in files and shown; the environment is where secrets belong.
            variables = (
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                if parts.scheme == "s3"
                else "GOOGLE_APPLICATION_CREDENTIALS"
            )
            raise ConfigError(
                place, "must not hold a user or password", f"Set {variables} in the environment"
            )
        prefix = unquote(parts.path).strip("/")
        place = f"results address {parts.scheme}://{parts.netloc}{parts.path}"
        if not parts.netloc or parts.fragment:
            raise ConfigError(place, "needs a bucket, and takes no '#'", fix)
        if any(part in ("", ".", "..") for part in prefix.split("/") if prefix):
            raise ConfigError(place, "its prefix has an empty part, '.' or '..'", fix)
        options = sorted(parse_qsl(parts.query, keep_blank_values=True))
        for name, value in options:
            if name not in known or not value:
                raise ConfigError(
                    place, f"has no option {name!r}", f"Known ones are {', '.join(known)}"
                )
        return cls(parts.scheme, parts.netloc, prefix, tuple(options))

    def __str__(self) -> str:
        query = f"?{urlencode(self.options, safe=':/')}" if self.options else ""
        path = f"/{quote(self.prefix)}" if self.prefix else ""
        return f"{self.scheme}://{self.bucket}{path}{query}"

    @property
    def place(self) -> str:
        """The same whichever way leads there: without the connection's options."""
        return str(StoreAddress(self.scheme, self.bucket, self.prefix))

    @property
    def root(self) -> str:
        """Bucket and prefix, as pyarrow wants them."""
        return f"{self.bucket}/{self.prefix}" if self.prefix else self.bucket

    @property
    def digest(self) -> str:
        """A short name of it for a folder."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:_DIGITS]


def is_address(text: str) -> bool:
    """Whether a results place is written as an address and not as a path."""
    return "://" in text


def scratch() -> Path:
    """Where this machine keeps its copies of what is in object stores."""
    given = os.environ.get(SCRATCH)
    return (Path(given) if given else Path("~/.cache/topotune").expanduser()).absolute()


def write_scratch(path: Path, content: bytes) -> None:
    """Write a file of such a copy, whole or not at all, in a folder that is made.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written: {error.strerror}. Make space, or set {SCRATCH} to a "
            "folder with more"
        ) from error


def results_folder(text: str) -> Path:
    """The folder to work in for a results place: the path itself, or the one here that stands for
    an address; it is made.

    Raises:
        ConfigError: it is no address.
        ResourceError: the folder cannot be made.
    """
    if not is_address(text):
        return Path(text)
    address = StoreAddress.parse(text)
    folder = scratch() / "stores" / address.digest
    mark = folder / _MARK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not mark.is_file():
            write_atomically(mark, f"{address}\n".encode())
    except OSError as error:
        raise ResourceError(
            f"{folder}: the working folder for {address} cannot be made: {error.strerror}. Set "
            f"{SCRATCH} to a writable folder"
        ) from error
    return folder


def store_address(results_dir: Path) -> StoreAddress | None:
    """The store that a results folder stands for; None of a folder that is just a folder.

    Only where this machine itself keeps such folders, and under the address's own digest: a mark
    in a folder from elsewhere does not count.
    """
    folder = results_dir.absolute()
    if folder.parent != scratch() / "stores":
        return None
    try:
        address = StoreAddress.parse((folder / _MARK).read_text(encoding="utf-8").strip())
    except (OSError, ValueError, ConfigError):
        return None
    return address if address.digest == folder.name else None


def shown_place(results_dir: Path) -> str:
    """A results place as a person writes it on a command line."""
    address = store_address(results_dir)
    return str(results_dir) if address is None else shlex.quote(str(address))


def shown_search(root: Path) -> str:
    """A search's folder as a person finds it: the path, or its place in the store."""
    address = store_address(root.parent)
    return str(root) if address is None else f"{address.place}/{root.name} (here: {root})"


def worker_folder(address: StoreAddress, name: str) -> Path:
    """Where this node's workers keep a search."""
    return scratch() / "workers" / address.digest / name
