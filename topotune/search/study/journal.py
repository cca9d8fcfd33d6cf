"""The study's file: Optuna's own journal records, one a line, each with a checksum, in two copies.

A line is what Optuna's JournalFileBackend writes, which can read the file, with one more key at its
end: ``crc``, the CRC-32 of all records up to this one. So a bit that flips is found by its line,
and no line can be lost, doubled or moved from elsewhere unseen.

Optuna appends one operation at a time, a parameter each. They are gathered, and written and forced
to disk as one turn by :meth:`Journal.commit`, before anything is done on the strength of them. The
mark ``+`` says that a line's turn goes on after it: a turn that a crash tore is as none. The copy
is written in the same turn, and forced where a trial ends.

Both files hold the same bytes, one perhaps fewer of them; so each turn counts that is whole in one.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from topotune.errors import ResourceError, SearchFolderError
from topotune.files import append
from topotune.search.place.folder import not_written, write_bytes

_LOOKS = 3
_START = b'{"op_code":'
_CHECK = re.compile(rb',"crc":"([0-9a-f]{8})(\+?)"\}\Z')


@dataclass(frozen=True)
class _Found:
    """What a file holds.

    Attributes:
        whole: its whole turns, up to the first line that is damaged.
        crc: of these.
        fault: the number of the line that is damaged, 0 for none.
        reach, last: the bytes up to the end of the last turn that is intact, before a damage or
            after it, and the CRC that it states.
    """

    whole: bytes
    crc: int
    fault: int
    reach: int
    last: int


def _examine(content: bytes, crc: int = 0) -> _Found:
    end = position = fault = reach = 0
    end_crc = last = crc
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        position += len(line) + 1
        check = _CHECK.search(line)
        if check is None:
            fault = fault or number
            continue
        stated = int(check[1], 16)
        intact = zlib.crc32(line[: check.start()], crc) == stated
        fault = fault or (0 if intact else number)
        crc = stated  # the line after a damaged one can be intact by itself
        if intact and not check[2]:
            reach, last = position, crc
            if not fault:
                end, end_crc = position, crc
    if not fault and not _START.startswith(content[position:][: len(_START)]):
        fault = content.count(b"\n") + 1  # what a crash tore is the beginning of a record
    return _Found(content[:end], end_crc, fault, reach, last)


def _records(whole: bytes) -> Iterator[dict[str, Any]]:
    return map(json.loads, whole.splitlines())


def _read(path: Path, start: int = 0) -> bytes:
    """A file's content, empty if it does not exist.

    Raises:
        ResourceError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be read: {error.strerror}. Give this user read access to it"
        ) from error


def _join(
    paths: Sequence[Path], start: int = 0, crc: int = 0
) -> tuple[bytes, int, dict[Path, _Found]]:
    """The turns that come after so many bytes, each from a file in which it is whole; their CRC;
    and what each file holds by itself.

    Raises:
        SearchFolderError: something is lost that none of them holds.
        ResourceError: one cannot be read.
    """
    contents = {path: _read(path, start) for path in paths}
    found = left = {path: _examine(content, crc) for path, content in contents.items()}
    whole = b""
    while (best := max(left.values(), key=lambda one: len(one.whole))).whole:
        whole, crc = whole + best.whole, best.crc
        # A file that is damaged before this place can go on after it: all hold the same bytes.
        left = {path: _examine(content[len(whole) :], crc) for path, content in contents.items()}
    if any(one.reach and one.last != crc for one in left.values()):
        hurt = " and ".join(f"{p.name} at line {f.fault}" for p, f in found.items() if f.fault)
        raise SearchFolderError(
            f"{paths[0]}: the study is damaged ({hurt}), so that none of its files is whole. Bring "
            "one back from a backup, then resume; leaderboard.json holds the last known results"
        )
    return whole, crc, found


class JournalReader(BaseJournalBackend):
    """Reads a study that another process may be driving; changes nothing.

    Args:
        paths: the study's files, the first one first.

    Raises:
        SearchFolderError: it is damaged.
        ResourceError: it cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._end = self._crc = 0

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """The records that have come since the last call; from 0 on, all."""
        if log_number_from == 0:
            self._end = self._crc = 0
        whole, self._crc, _ = self._look()
        self._end += len(whole)
        return _records(whole)

    def _look(self) -> tuple[bytes, int, dict[Path, _Found]]:
        for _ in range(_LOOKS - 1):
            # Where one file is damaged, a turn that came between reading the two seems lost.
            with suppress(SearchFolderError):
                return _join(self._paths, self._end, self._crc)
        return _join(self._paths, self._end, self._crc)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Refuse.

        Raises:
            ResourceError: always.
        """
        raise ResourceError(f"{self._paths[0]}: is open read-only: only its driver changes it")


@dataclass
class _Copy:
    """One of a journal's files: how many bytes it has, how many of them are forced to disk, and
    what is to be appended."""

    path: Path
    end: int
    forced: int
    new: bytearray = field(default_factory=bytearray)

    def write(self, force: bool) -> None:
        if not self.new and (self.forced == self.end or not force):
            return
        try:
            append(self.path, bytes(self.new), self.end, force)
        except OSError as error:
            raise not_written(self.path, error) from error
        self.end += len(self.new)
        self.new.clear()
        if force:
            self.forced = self.end


class Journal(BaseJournalBackend):
    """A study's files, for the one driver that changes them; what a crash or a damage left of one
    is made whole first.

    Args:
        paths: the files; the first is forced to disk at every commit, the others where one asks.
        note: called with a line on each file that is made whole.
        fence: called before each write; raises if another driver has taken the search over.
        anew: begin empty; the first commit replaces what is there.

    Raises:
        SearchFolderError: no file has all of what was stored.
        ResourceError: a file cannot be read or written.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        note: Callable[[str], None] = lambda text: None,
        fence: Callable[[], None] = lambda: None,
        anew: bool = False,
    ) -> None:
        self._fence, self._anew = fence, anew
        self._whole, self._crc = (b"", 0) if anew else _made_whole(paths, note)
        end = len(self._whole)
        self._copies = [_Copy(path, end, end) for path in paths]
        self._turn: list[bytes] = []
        self._unread: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """The records that have come since the last call; at first all that were stored."""
        stored, self._whole = self._whole, b""
        new, self._unread = self._unread, []
        return [*_records(stored), *new]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Take records into the present turn."""
        for log in logs:
            body = json.dumps(log, separators=(",", ":")).encode()
            self._turn.append(body[:-1])
            self._unread.append(json.loads(body))  # as a reader of the file will have it

    def commit(self, force: bool = False) -> None:
        """Write the present turn and force it to disk.

        Args:
            force: whether the copies are forced, too.

        Raises:
            ResourceError: the disk is full, or the folder cannot be written; the turn is then
                written with the next commit.
            LeaseLostError: another driver has taken the search over.
        """
        if not (self._turn or force or any(copy.new for copy in self._copies)):
            return
        for left, body in enumerate(self._turn, start=1 - len(self._turn)):
            self._crc = zlib.crc32(body, self._crc)
            line = b'%b,"crc":"%08x%b"}\n' % (body, self._crc, b"+" if left else b"")
            for copy in self._copies:
                copy.new += line
        self._turn = []
        # The forced file comes last: a kill while it is forced then finds the turn in all of them.
        for copy in reversed(self._copies):
            self._fence()  # for each: the write before it may have hung for long
            if self._anew:
                write_bytes(copy.path, bytes(copy.new))
                copy.end = copy.forced = len(copy.new)
                copy.new.clear()
            copy.write(force or copy is self._copies[0])
        self._anew = False


def _made_whole(paths: Sequence[Path], note: Callable[[str], None]) -> tuple[bytes, int]:
    """Bring all files to what they hold together; that, and its CRC."""
    whole, crc, found = _join(paths)
    for path, one in found.items():
        there = path.exists()
        if one.fault or (whole and (not there or (path == paths[0] and one.whole != whole))):
            state = f"is damaged at line {one.fault}" if one.fault else "lacks its newest records"
            aside = _unused(path) if one.fault and there else None
            moved = f"moved to {aside.name}, " if aside else ""
            others = " and ".join(other.name for other in paths if other != path)
            cut = one.whole == whole
            mended = "what follows is cut off" if cut else f"made whole from {others}"
            note(f"warning: {path.name} {state if there else 'is missing'}; {moved}{mended}")
            write_bytes(path, whole, aside)
        elif there and (one.whole != whole or path.stat().st_size != len(whole)):
            write_bytes(path, whole)  # a turn that a crash tore, or kept from the copy
    return whole, crc


def _unused(path: Path) -> Path:
    index = 1
    while (aside := path.with_name(f"{path.stem}.damaged-{index}.jsonl")).exists():
        index += 1
    return aside
