"""Checkpoints that are whole, checked, and of the right trial, or are refused.

torch is imported where a state is written or read: commands that only look at a search know its
files by the names here, and start without it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from topotune.errors import CheckpointError
from topotune.files import write_atomically
from topotune.records import TrialSpec

_log = logging.getLogger(__name__)

CHECKPOINT_FILE = "checkpoint.pt"
PREVIOUS_FILE = "checkpoint.previous.pt"
_MAGIC = b"topotune checkpoint 2 sha256 "
_HEADER_BYTES = len(_MAGIC) + 64 + 1  # magic, hexadecimal digest, newline

_WHERE_AND_HOW = ("overhead", "device", "threads", "data_dir", "download")


def identity(spec: TrialSpec) -> dict[str, Any]:
    """The part of a spec that says what is trained: all but where and how it is run.

    A checkpoint continues only under a spec with the same identity.
    """
    fields = TrialSpec.from_json(spec.to_json()).to_dict()
    return {name: value for name, value in fields.items() if name not in _WHERE_AND_HOW}


class _DamagedError(Exception):
    """One file is not a whole checkpoint; the text says why."""


class CheckpointStore:
    """The newest checkpoint of one trial and the one before it, in one folder.

    A file is one line (format and SHA-256 of the rest), a line of JSON (whose trial it is, and its
    record), and what ``torch.save`` wrote of the state. Truncation and bit rot are found before
    anything is read from it, and the record is read without the state, which may be large. The
    state must hold tensors, numbers, text and plain containers only: it is read with
    ``weights_only=True``.
    """

    def __init__(self, folder: Path, spec: TrialSpec) -> None:
        self._newest = folder / CHECKPOINT_FILE
        self._previous = folder / PREVIOUS_FILE
        self._identity = identity(spec)

    def save(self, state: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> None:
        """Make this state the newest checkpoint; the present one becomes the previous.

        Args:
            state: what training goes on from.
            record: strict JSON; :meth:`load` gives its items beside those of the state.

        Raises:
            CheckpointError: it cannot be written; the last one stays readable.
        """
        import torch

        head = {"identity": self._identity, "record": dict(record or {})}
        buffer = io.BytesIO()
        buffer.write(json.dumps(head, allow_nan=False).encode() + b"\n")
        torch.save(dict(state), buffer)
        payload = buffer.getvalue()
        digest = hashlib.sha256(payload).hexdigest().encode()
        try:
            write_atomically(self._newest, _MAGIC + digest + b"\n" + payload, keep=self._previous)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {self._newest}: cannot be written: {error}. "
                "Make space or make the folder writable, then resume"
            ) from error

    def load(self) -> dict[str, Any] | None:
        """The newest readable state, its tensors on the CPU; None where no checkpoint exists.

        A damaged newest file is reported in the log and the previous one used.

        Raises:
            CheckpointError: every file there is damaged, one cannot be read now though it may be
                whole, or it belongs to another spec.
        """
        state, faults = self._newest_whole(_state)
        if state is None and faults:
            raise CheckpointError(
                f"checkpoint {'; '.join(faults)}. No earlier one is left: delete the folder "
                f"{self._newest.parent} to train this trial from the start"
            )
        return state

    def load_or_restart(self) -> dict[str, Any] | None:
        """As :meth:`load`, but None also where every file is damaged: training starts over, which
        loses time and nothing else. Reported in the log.

        Raises:
            CheckpointError: one cannot be read now, or it belongs to another spec.
        """
        state, faults = self._newest_whole(_state)
        if state is None and faults:
            _log.warning("no earlier checkpoint is left; the trial starts from its beginning")
        return state

    def load_record(self) -> dict[str, Any] | None:
        """The record of the newest readable checkpoint; None without a checkpoint.

        Raises:
            CheckpointError: as :meth:`load_or_restart`.
        """
        return self._newest_whole(lambda head, payload: _object(head, "record"))[0]

    def _newest_whole(
        self, taken: Callable[[dict[str, Any], bytes], dict[str, Any]]
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """What is taken of the newest whole file, and what is wrong with those before it.

        Args:
            taken: makes it of a file's head and the rest; raises OSError or MemoryError where
                that may succeed later.
        """
        faults: list[str] = []
        for path in (self._newest, self._previous):
            try:
                head, payload = _read(path)
                content = taken(head, payload)
            except FileNotFoundError:
                continue
            except (OSError, MemoryError) as error:
                raise _unread(path, error) from error
            except _DamagedError as fault:
                faults.append(f"{path}: {fault}")
                _log.warning(
                    "checkpoint %s is damaged (%s); looking for the one before", path, fault
                )
                continue
            self._check_identity(path, _object(head, "identity"))
            if faults:
                _log.warning("continuing from the previous checkpoint %s", path)
            return content, faults
        return None, faults

    def _check_identity(self, path: Path, found: Mapping[str, Any]) -> None:
        wanted = self._identity
        differing = sorted(
            name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
        )
        if differing:
            details = ", ".join(
                f"{name} is {found.get(name)!r} there and {wanted.get(name)!r} here"
                for name in differing
            )
            raise CheckpointError(
                f"checkpoint {path}: belongs to another trial ({details}). "
                "Use another folder, or the spec that the checkpoint was written with"
            )


def _unread(path: Path, error: Exception) -> CheckpointError:
    """For a file that may be whole: starting over would write over it."""
    return CheckpointError(
        f"checkpoint {path}: cannot be read now: {error or type(error).__name__}. Nothing was "
        "changed: mend the disk, the permission or the shortage, then resume"
    )


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """A whole file's head, and what follows it."""
    content = path.read_bytes()
    magic, rest = content[:_HEADER_BYTES], memoryview(content)[_HEADER_BYTES:]
    if not magic.startswith(_MAGIC) or len(magic) < _HEADER_BYTES:
        raise _DamagedError("does not begin like a checkpoint of this version")
    if hashlib.sha256(rest).hexdigest().encode() != magic[len(_MAGIC) : -1]:
        raise _DamagedError(f"its {len(content)} bytes do not match their checksum")
    line, _, payload = bytes(rest).partition(b"\n")
    try:
        head = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"its content cannot be decoded: {error}") from error
    if not isinstance(head, dict):
        raise _DamagedError("its content is not a trial's state")
    return head, payload


def _object(head: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = head.get(name)
    if not isinstance(found, dict):
        raise _DamagedError("its content is not a trial's state")
    return found


def _state(head: Mapping[str, Any], payload: bytes) -> dict[str, Any]:
    """The state with the record's items."""
    import torch

    _object(head, "identity")
    try:
        loaded = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything on what others have written
        if isinstance(error, OSError | MemoryError):
            raise
        if "can't allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise _DamagedError(f"its content cannot be decoded: {error}") from error
    if not isinstance(loaded, dict):
        raise _DamagedError("its content is not a trial's state")
    return {**loaded, **_object(head, "record")}
