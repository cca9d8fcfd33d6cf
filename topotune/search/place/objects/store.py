"""An object store, by the few things that a search asks of it; each call is whole or an error."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

from topotune.errors import ResourceError
from topotune.redaction import redact
from topotune.search.place.objects.address import StoreAddress, write_scratch

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

T = TypeVar("T")

LIMIT_SECONDS = 600.0
"""How long a running search waits for its store before it ends (resumable)."""
OPENING_SECONDS = 30.0
"""How long a search that begins or is resumed waits for its store to be tried out."""
READER_SECONDS = 10.0
"""How long ``status`` and its like wait."""
_CONNECT_SECONDS = 5
_STILL_SECONDS = 10
"""A transfer in which nothing has moved for this long has failed."""
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 5.0
_BEAT_SECONDS = 1.0
_LARGE = 4 << 20
"""Bytes above which an upload goes in parts."""
# What waiting does not mend, as Arrow words the answers of S3 and of Google's store.
_REFUSED = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE|UNRECOGNIZED_CLIENT|MISSING_AUTH"
    r"|HTTP status (?:301|400|401|403)|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT"
)


class ObjectStore:
    """The objects below an address, by names relative to it.

    Args:
        address: where.
        note: called with a line when waiting for the store begins and when it is over.
        limit: seconds after which the waiting ends in an error.
        beat: called about once a second during long calls, as a sign of life.
        meanwhile: said when the waiting begins: where things are until the store is back.

    Attributes:
        stopping: asked while waiting; true ends it at once.
        trouble: what the last call met, while it is waited for; empty if all is well.

    Raises:
        ResourceError: from every method: the store refuses, or is away for longer than ``limit``.
    """

    def __init__(
        self,
        address: StoreAddress,
        note: Callable[[str], None] = lambda text: None,
        limit: float = LIMIT_SECONDS,
        beat: Callable[[], None] | None = None,
        meanwhile: str = "",
    ) -> None:
        self.address, self.note, self.limit, self._beat = address, note, limit, beat
        self.stopping: Callable[[], object] = lambda: False
        self.trouble, self._meanwhile = "", f". {meanwhile}" if meanwhile else ""
        self._root = address.root
        self._opened: FileSystem | None = None
        self._opening = threading.Lock()

    @property
    def _system(self) -> FileSystem:
        with self._opening:
            if self._opened is None:
                self._opened = connect(self.address)
            return self._opened

    def objects(self, folder: str = "") -> dict[str, int]:
        """Sizes of all objects below a folder, by their names relative to that folder."""
        from pyarrow.fs import FileSelector, FileType

        base = self._path(folder)

        def call() -> dict[str, int]:
            selector = FileSelector(base, recursive=True, allow_not_found=True)
            return {
                info.path[len(base) + 1 :]: info.size
                for info in self._system.get_file_info(selector)
                if info.type == FileType.File
            }

        return self._patient("list", folder or ".", call)

    def folders(self) -> list[str]:
        """The names of the folders at the top, sorted."""
        from pyarrow.fs import FileSelector, FileType

        def call() -> list[str]:
            selector = FileSelector(self._root, allow_not_found=True)
            found = self._system.get_file_info(selector)
            return sorted(info.base_name for info in found if info.type == FileType.Directory)

        return self._patient("list", ".", call)

    def read(self, name: str) -> bytes | None:
        """An object's content as one request gives it; None where it is missing."""

        def call() -> bytes | None:
            try:
                with self._system.open_input_file(self._path(name)) as file:
                    size = file.size()
                    content: bytes = file.read(size) if size else b""
            except FileNotFoundError:
                return None
            if len(content) != size:
                raise OSError(f"{len(content)} of {size} bytes came")
            return content

        return self._patient("read", name, call)

    def write(self, name: str, content: bytes) -> None:
        """Replace an object as a whole: a reader, also after a crash, finds the old one or the new
        one."""

        def call() -> None:
            path = self._path(name)
            with self._system.open_output_stream(path) as file:
                file.write(content)
            if len(content) > _LARGE:  # put together of parts, by a call that may be cut short
                size = self._system.get_file_info(path).size
                if size != len(content):
                    raise OSError(f"{size} of {len(content)} bytes arrived")

        self._patient("write", name, call)

    def upload(self, path: Path, name: str) -> bool:
        """Write a file's present content; False where the file is gone."""
        try:
            content = path.read_bytes()  # whole: a part of a file must never become an object
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ResourceError(
                f"{path}: cannot be read: {error.strerror}. Mend the disk, then resume"
            ) from error
        self.write(name, content)
        return True

    def download(self, name: str, path: Path) -> bool:
        """Put an object's content in a file's place, whole or not at all; False where there is no
        such object."""
        content = self.read(name)
        if content is None:
            return False
        write_scratch(path, content)
        return True

    def delete(self, name: str) -> None:
        """Remove an object, if there is one."""

        def call() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._system.delete_file(self._path(name))

        self._patient("delete", name, call)

    def delete_folder(self, name: str) -> None:
        """Remove every object below a folder."""

        def call() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._system.delete_dir(self._path(name))

        self._patient("delete", name, call)

    def check(self) -> None:
        """Write, read and delete an object, so that a fault is found before anything depends on it.

        Raises:
            ResourceError: the store cannot be used.
        """
        name, content = f".topotune-check-{uuid.uuid4().hex}", os.urandom(16)
        self.write(name, content)
        found = self.read(name)
        self.delete(name)
        if found != content:
            raise ResourceError(
                f"object store {self.address}: what was written is not what is read back. Choose "
                "another results address"
            )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _patient(self, verb: str, name: str, call: Callable[[], T]) -> T:
        """The call's value, as soon as the store gives it."""
        began, delay, noted = time.monotonic(), _FIRST_DELAY, False
        while True:
            try:
                with self._beating():
                    value = call()
            except OSError as error:
                self.trouble = text = redact(" ".join(str(error).split()))[:300]
                if _REFUSED.search(text):
                    raise ResourceError(
                        f"object store {self.address}: cannot {verb} {name}: {text}. Check the "
                        "address and the credentials of this machine's environment"
                    ) from error
            else:
                self.trouble = ""
                if noted:
                    self.note("the object store is back; going on")
                return value
            waited = time.monotonic() - began
            if waited > self.limit or self.stopping():
                raise ResourceError(
                    f"object store {self.address}: cannot {verb} {name}, for {waited:.0f} s now: "
                    f"{text}. Nothing that is finished is lost: go on when it is back"
                )
            if not noted:
                noted = True
                self.note(
                    f"the object store {self.address} does not answer, waiting: {text}"
                    + self._meanwhile
                )
            if self._beat is not None:
                self._beat()
            time.sleep(min(delay, max(self.limit - waited, 0.05)))
            delay = min(2 * delay, _LONGEST_DELAY)

    @contextlib.contextmanager
    def _beating(self) -> Iterator[None]:
        """Show signs of life while a call lasts, which ends by itself where nothing moves."""
        if self._beat is None:
            yield
            return
        over, beat = threading.Event(), self._beat

        def beats() -> None:
            while not over.wait(_BEAT_SECONDS):
                beat()

        thread = threading.Thread(target=beats, name="store-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def connect(address: StoreAddress) -> FileSystem:
    """Arrow's view of a store, with short time-outs; nothing is asked yet, but for the region of a
    bucket of AWS where neither the address nor the environment names one.

    Raises:
        ResourceError: it cannot be set up.
    """
    from pyarrow import fs

    options: dict[str, Any] = dict(address.options)
    try:
        if address.scheme == "gs":
            options.setdefault("retry_limit_seconds", str(_STILL_SECONDS))
            opened: FileSystem = fs.FileSystem.from_uri(
                f"gs://{address.bucket}?{urlencode(options, safe=':/')}"
            )[0]
            return opened
        endpoint = str(options.pop("endpoint_override", ""))
        scheme, mark, host = endpoint.partition("://")
        if mark:
            options = {"scheme": scheme, **options}
        named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        elsewhere = endpoint or any(
            os.environ.get(name) for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
        )
        region = options.pop("region", None) or named
        if region is None:
            region = "us-east-1" if elsewhere else fs.resolve_s3_region(address.bucket)
        return fs.S3FileSystem(
            region=region,
            endpoint_override=(host if mark else endpoint) or None,
            connect_timeout=_CONNECT_SECONDS,
            request_timeout=_STILL_SECONDS,
            allow_delayed_open=True,  # a small object is one request
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),  # the patience is ours
            **options,
        )
    except (OSError, ValueError, TypeError) as error:
        text = redact(" ".join(str(error).split()))[:300]
        raise ResourceError(
            f"object store {address}: cannot be set up: {text}. Check the address, the region "
            "(AWS_REGION) and the credentials of this machine's environment"
        ) from error
