"""What the shipper remembers across restarts: how far it sent the outbox, and what was refused.

Losing these files costs only time: everything is sent again, and the store keeps each thing once.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topotune.errors import OutboxError
from topotune.redaction import redact
from topotune.tracking.entries import Item
from topotune.tracking.outbox import OUTBOX_FILE

PROGRESS_FILE = "shipped.json"
REFUSED_FILE = "refused.jsonl"
_CHECKED = 4096
"""Bytes before the offset by which an outbox that was replaced is noticed."""
_UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError),
)
"""What a damaged file of this shape can raise while it is taken apart."""
_log = logging.getLogger(__name__)


class Progress:
    """The state of shipping one search into one store, kept in ``shipped.json``.

    Args:
        folder: the search folder.
        store: label of the store. What was saved about another store is not used.

    Attributes:
        offset: all records before it are dealt with.
        runs: MLflow's run id by trial number; "search" for the parent.
        ended: when the runs that are ended did so, Unix milliseconds, by the same keys.
        refused: how many items were refused of them.
    """

    def __init__(self, folder: Path, store: str) -> None:
        self._outbox, self._path = folder / OUTBOX_FILE, folder / PROGRESS_FILE
        self._store = store
        self._seen: tuple[int, int] | None = None
        self.offset = self.refused = 0
        self.runs: dict[str, str] = {}
        self.ended: dict[str, int] = {}
        self.refresh()

    def refresh(self) -> bool:
        """Take over what another shipper saved since, if one did; whether one did."""
        try:
            stat = self._path.stat()
            if self._seen == (stat.st_ino, stat.st_mtime_ns):
                return False
            self._seen = (stat.st_ino, stat.st_mtime_ns)
            data: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            if data.pop("check") != _check(data):
                raise ValueError("checksum does not match")
            store, offset, crc = str(data["store"]), int(data["offset"]), int(data["crc"])
            refused = int(data["refused"])
            runs = {str(k): str(v) for k, v in data["runs"].items()}
            ended = {str(k): int(v) for k, v in data["ended"].items()}
            if offset < 0:
                raise ValueError(f"offset {offset}")
        except FileNotFoundError:
            return False
        except _UNREADABLE as e:
            _log.warning("%s: damaged (%s: %s)", self._path, type(e).__name__, e)
            return False
        if store != self._store:
            _log.warning("%s: is about %s; %s gets everything", self._path, store, self._store)
            return False
        self.runs, self.ended, self.offset, self.refused = runs, ended, offset, refused
        if self._crc() != crc:
            _log.warning("%s: is not what was sent of it; it is sent again", self._outbox)
            self.offset = 0
        return True

    def _crc(self) -> int | None:
        """The CRC-32 of what stands before the offset; None where the file is shorter."""
        try:
            with self._outbox.open("rb") as file:
                first = max(0, self.offset - _CHECKED)
                file.seek(first)
                found = file.read(self.offset - first)
        except FileNotFoundError:
            found = b""
        except (OSError, ValueError, OverflowError) as error:
            _log.warning("%s: cannot be read: %s", self._outbox, error)
            return None
        return zlib.crc32(found) if len(found) == min(self.offset, _CHECKED) else None

    def clear(self) -> None:
        """Forget everything, so that everything is sent again."""
        self.offset = self.refused = 0
        self.runs.clear()
        self.ended.clear()
        self._path.unlink(missing_ok=True)

    def save(self) -> None:
        """Replace the saved state as a whole. It is not forced to disk: losing it is harmless.

        Raises:
            OutboxError: the folder cannot be written.
        """
        data: dict[str, Any] = {
            "store": self._store,
            "offset": self.offset,
            "crc": self._crc(),
            "runs": self.runs,
            "ended": self.ended,
            "refused": self.refused,
        }
        data["check"] = _check(data)
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            partial.write_text(json.dumps(data), encoding="utf-8")
            stat = partial.stat()
            partial.replace(self._path)
        except OSError as error:
            raise OutboxError(f"{self._path}: cannot be written: {error.strerror}") from error
        self._seen = (stat.st_ino, stat.st_mtime_ns)


def _check(data: Mapping[str, Any]) -> int:
    """The CRC-32 of what is saved: a run's id under another key would send to another's run."""
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())


class Refused:
    """The items that the store will never take, each once, with the reason.

    A line of ``refused.jsonl`` names the byte offset of the record in the outbox, the item and the
    store's answer.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / REFUSED_FILE
        self._known: set[tuple[int, str, str]] = set()
        self.refresh()

    def refresh(self) -> None:
        """Take over what another shipper added.

        Raises:
            OutboxError: the file cannot be read.
        """
        self._known.clear()
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise OutboxError(f"{self._path}: cannot be read: {error.strerror}") from error
        for line in lines:
            try:
                old = json.loads(line)
                self._known.add((old["offset"], old["kind"], old["key"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # a torn line: its item is refused, and written, once more

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, identity: tuple[int, str, str]) -> bool:
        return identity in self._known

    def add(self, offset: int, item: Item, reason: str) -> None:
        """Set an item aside.

        Raises:
            OutboxError: the folder cannot be written.
        """
        identity = (offset, item.kind, item.key)
        if identity in self._known:
            return
        line = {
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
            raise OutboxError(f"{self._path}: cannot be written: {error.strerror}") from error
        self._known.add(identity)
        _log.warning("%s %r was refused: %s", item.kind, item.key, line["reason"])

    def clear(self) -> None:
        """Forget all, because everything is offered again."""
        self._path.unlink(missing_ok=True)
        self._known.clear()
