"""What the shipper remembers across restarts: how far it sent each spool, and what was refused.

Losing this file costs only time: everything is sent again, and the store keeps each thing once.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from topotune.errors import SpoolError
from topotune.redaction import redact
from topotune.tracking.entries import Item

PROGRESS_FILE = "shipped.json"
REFUSED_FILE = "refused.jsonl"
_UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError),
)
"""What a damaged file of this shape can raise while it is taken apart."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpoolProgress:
    """How far one spool is sent.

    Attributes:
        offset: bytes of it that are dealt with.
        shipped: items of it that the store took.
        last: where the last line before ``offset`` starts.
        crc: the CRC-32 of that line, by which a file that was replaced is noticed.
    """

    offset: int = 0
    shipped: int = 0
    last: int = 0
    crc: int = 0

    def fits(self, path: Path) -> bool:
        """Whether the spool still holds what was sent of it."""
        if self.offset == 0:
            return True
        try:
            with path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self.offset:
                    return False
                file.seek(self.last)
                return zlib.crc32(file.read(self.offset - self.last)) == self.crc
        except (OSError, ValueError):
            return False


@dataclass(frozen=True)
class Ended:
    """When a run was ended, and whether the driver said so."""

    at: int
    by_driver: bool


class Progress:
    """The state of shipping one search into one store, kept in ``shipped.json``.

    Args:
        folder: the search folder.
        store: label of the store. What was saved about another store is not used.
    """

    def __init__(self, folder: Path, store: str) -> None:
        self._folder = folder
        self._path = folder / PROGRESS_FILE
        self._store = store
        self._seen: tuple[int, int] | None = None
        self._spools: dict[str, SpoolProgress] = {}
        self.runs: dict[str, str] = {}
        """MLflow's run id by trial number; "search" for the parent."""
        self.ended: dict[str, Ended] = {}
        """The runs that are ended, by the same keys."""
        self.refresh()

    def refresh(self) -> None:
        """Take over what another shipper saved since; keep what is known where nobody did."""
        try:
            stat = self._path.stat()
            if self._seen == (stat.st_ino, stat.st_mtime_ns):
                return
            self._seen = (stat.st_ino, stat.st_mtime_ns)
            data: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            store = str(data["store"])
            spools = {str(k): _spool_progress(v) for k, v in data["spools"].items()}
            runs = {str(k): str(v) for k, v in data["runs"].items()}
            ended = {str(k): Ended(int(v[0]), bool(v[1])) for k, v in data["ended"].items()}
        except FileNotFoundError:
            return
        except _UNREADABLE as e:
            _log.warning("%s: damaged (%s: %s)", self._path, type(e).__name__, e)
            return
        if store != self._store:
            _log.warning("%s: is about %s; %s gets everything", self._path, store, self._store)
            return
        self._spools, self.runs, self.ended = spools, runs, ended
        for name, spool in list(spools.items()):
            if not spool.fits(self._folder / name):
                _log.warning("%s: is not what was sent of it; it is sent again", name)
                self.restart(name)

    def of(self, spool: str) -> SpoolProgress:
        """How far a spool is sent."""
        return self._spools.setdefault(spool, SpoolProgress())

    def restart(self, spool: str) -> None:
        """Send a spool from its beginning."""
        self._spools[spool] = SpoolProgress()

    def advance(self, spool: str, last: int, end: int, taken: int) -> None:
        """A piece of a spool is dealt with: its last line is ``[last, end)``."""
        with (self._folder / spool).open("rb") as file:
            file.seek(last)
            crc = zlib.crc32(file.read(end - last))
        self._spools[spool] = SpoolProgress(end, self.of(spool).shipped + taken, last, crc)

    def clear(self) -> None:
        """Forget everything, so that everything is sent again."""
        self._spools.clear()
        self.runs.clear()
        self.ended.clear()
        self._path.unlink(missing_ok=True)

    @property
    def fresh(self) -> bool:
        """Whether nothing was sent yet."""
        return not any(spool.offset for spool in list(self._spools.values()))

    @property
    def shipped(self) -> int:
        """Items that the store took."""
        return sum(spool.shipped for spool in list(self._spools.values()))

    def save(self) -> None:
        """Replace the saved state as a whole. It is not forced to disk: losing it is harmless.

        Raises:
            SpoolError: the folder cannot be written.
        """
        data = {
            "store": self._store,
            "spools": {name: astuple(spool) for name, spool in self._spools.items()},
            "runs": self.runs,
            "ended": {key: astuple(ended) for key, ended in self.ended.items()},
        }
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            partial.write_text(json.dumps(data), encoding="utf-8")
            stat = partial.stat()
            partial.replace(self._path)
        except OSError as error:
            raise SpoolError(f"{self._path}: cannot be written: {error.strerror}") from error
        self._seen = (stat.st_ino, stat.st_mtime_ns)


def _spool_progress(data: list[Any]) -> SpoolProgress:
    offset, shipped, last, crc = (int(value) for value in data)
    if not 0 <= last <= offset:
        raise ValueError(f"offset {offset} before its last line at {last}")
    return SpoolProgress(offset, shipped, last, crc)


class Refused:
    """The items that the store will never take, each once, with the reason.

    A line of ``refused.jsonl`` names the spool, the byte offset of the record in it, the item and
    the store's answer.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / REFUSED_FILE
        self._known: set[tuple[str, int, str, str]] = set()
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise SpoolError(f"{self._path}: cannot be read: {error.strerror}") from error
        for line in lines:
            try:
                old = json.loads(line)
                self._known.add((old["spool"], old["offset"], old["kind"], old["key"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # a torn line: its item is refused, and written, once more

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, identity: tuple[str, int, str, str]) -> bool:
        return identity in self._known

    def add(self, spool: str, offset: int, item: Item, reason: str) -> None:
        """Set an item aside.

        Raises:
            SpoolError: the folder cannot be written.
        """
        identity = (spool, offset, item.kind, item.key)
        if identity in self._known:
            return
        line = {
            "spool": spool,
            "offset": offset,
            "kind": item.kind,
            "key": item.key,
            "value": str(item.value)[:200],
            "step": item.step,
            "reason": redact(reason),
        }
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise SpoolError(f"{self._path}: cannot be written: {error.strerror}") from error
        self._known.add(identity)
        _log.warning("%s: %s %r was refused: %s", spool, item.kind, item.key, line["reason"])

    def clear(self) -> None:
        """Forget all, because everything is offered again."""
        self._path.unlink(missing_ok=True)
        self._known.clear()
