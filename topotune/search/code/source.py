"""Which code a search runs: its user's modules, their git repository, the command, topotune itself.

Each session of a search writes what it found below ``sources/`` in the search's folder, in a
folder of its own where anything differs from the session before::

    sources/1/source.json   the modules' hashes, the repository, the command, topotune's version
    sources/1/git.diff      what was not committed, where there is a repository
    sources/1/code/...      the modules themselves, secrets replaced: a record, nothing is run here

The newest is the code of the search: a session that finds another asks first. Trials carry the
digest of what their own worker found (the tag :data:`CODE_TAG`).
"""

from __future__ import annotations

import datetime
import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from topotune.config.models import SearchConfig
from topotune.errors import ConfigError, OutboxError
from topotune.files import make_folder
from topotune.records import DATA_TAG, ROWS_TAG
from topotune.redaction import redact
from topotune.repository import COMMIT_TAG, Repository, own_tags, own_version
from topotune.search.code.shipped import REPOSITORY_FILE
from topotune.search.code.usercode import code_digest, contents, hashes, module_paths, user_files
from topotune.search.place.folder import SearchFolder, write_bytes, write_text
from topotune.tracking.entries import Start
from topotune.tracking.outbox import bodies_of

CODE_TAG, COMMAND_TAG = "topotune.code", "topotune.command"
RECORD_FILE, DIFF_FILE = "source.json", "git.diff"
FLAG = "--changed-code"
MAX_KEPT = 2**20
"""Bytes of a module that is kept; a larger one is known by its hash only."""
GIT_TAGS = tuple(f"mlflow.source.git.{name}" for name in ("commit", "branch", "repoURL", "dirty"))
"""MLflow's own, which its pages show."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The code of one session.

    Attributes:
        hashes: SHA-256 of each module's file, by its name as a module (``package/module.py``).
        repository: that the session started in, or was submitted from.
        command: the command line, without secrets.
        topotune: topotune's version, and its commit where it runs from a checkout.
        modules: full names of the modules that the search file names.
        files: where each module lies.
        contents: what each module held when it was hashed, before it was imported.
    """

    hashes: Mapping[str, str]
    repository: Repository | None
    command: str
    topotune: str
    modules: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    contents: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def here(cls, config: SearchConfig, root: Path) -> Self:
        """The code as it is now.

        Args:
            config: the search.
            root: the folder that its modules are imported from.
        """
        modules = tuple(sorted(module_paths(config.model_dump(mode="json"))))
        files = user_files(modules, root)
        words = [Path(sys.argv[0]).name, *sys.argv[1:]]
        return cls(
            hashes=hashes(found := contents(files)),
            repository=_shipped(root) or Repository.of(root),
            command=redact(shlex.join(words)),
            topotune=own_version(),
            modules=modules,
            files=files,
            contents=found,
        )

    @property
    def code(self) -> str:
        """One short name for all the modules; empty without modules."""
        return code_digest(self.hashes)

    @property
    def trial_tags(self) -> dict[str, str]:
        """Tags of a trial that ran this code."""
        tags = {CODE_TAG: self.code} if self.hashes else {}
        if (found := self.repository) is not None:
            values = (found.commit, found.branch, found.url, str(found.dirty).lower())
            tags |= {name: text for name, text in zip(GIT_TAGS, values, strict=True) if text}
        return tags

    @property
    def search_tags(self) -> dict[str, str]:
        """Tags of the search itself."""
        return {**self.trial_tags, **own_tags(), COMMAND_TAG: self.command}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the record; the diff is a file of its own."""
        found = self.repository
        git = None if found is None else {**found.to_dict(), "dirty": found.dirty}
        if git is not None:
            del git["diff"]
        return {
            "recorded": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "code": self.code,
            "modules": list(self.modules),
            "hashes": dict(self.hashes),
            "git": git,
            "command": self.command,
            "topotune": self.topotune,
        }


def _shipped(root: Path) -> Repository | None:
    """The repository that a search was submitted to a cluster from."""
    try:
        return Repository.from_dict(json.loads((root / REPOSITORY_FILE).read_text("utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def keep(folder: SearchFolder, source: Source) -> list[Path]:
    """Write a session's code into the search's folder, unless it is what the newest record says.

    Returns:
        The files of the record that counts now, :data:`RECORD_FILE` the first.

    Raises:
        ResourceError: the folder cannot be written.
    """
    known = records(folder)
    newest = max(known, default=0)
    home = folder.sources / str(newest)
    diff = source.repository.diff if source.repository is not None else ""
    if newest and _same(known[newest], source, home, diff):
        return _files(home)
    home = folder.sources / str(newest + 1)
    make_folder(home)
    if diff:
        write_text(home / DIFF_FILE, diff)
    for name, content in source.contents.items():
        if len(content) <= MAX_KEPT:
            text = redact(content.decode("utf-8", "surrogateescape"))
            make_folder((home / "code" / name).parent)
            write_bytes(home / "code" / name, text.encode("utf-8", "surrogateescape"))
    write_text(home / RECORD_FILE, json.dumps(source.to_dict(), indent=1) + "\n")
    return _files(home)


def records(folder: SearchFolder) -> dict[int, dict[str, Any]]:
    """The records of a search's sessions by number, in order; damaged ones are left out."""
    found = {}
    for path in folder.sources.glob(f"*/{RECORD_FILE}"):
        try:
            data = json.loads(path.read_text("utf-8"))
            known = {str(name): str(value) for name, value in data["hashes"].items()}
            found[int(path.parent.name)] = {**data, "hashes": known}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            _log.warning("%s: damaged (%s); it is not used", path, error)
    return dict(sorted(found.items()))


def check_unchanged(folder: SearchFolder, source: Source) -> None:
    """Make sure that a search goes on with the code that it ran until now.

    Raises:
        ConfigError: a module has changed since.
    """
    known = records(folder)
    if not known:
        return  # it began before its code was recorded
    newest = max(known)
    before = known[newest]["hashes"]
    if changes := changed(before, source.hashes):
        first = changes[0].partition(" ")[0]
        place = source.files.get(first, Path(first))
        if not source.files:
            raise ConfigError(
                f"search {folder.name!r}",
                f"its code ({', '.join(before)}) is not found from {Path.cwd()}",
                "Run the command in the folder that the code lies in",
            )
        raise ConfigError(
            str(place),
            f"the code of search {folder.name!r} is not what its trials ran: {', '.join(changes)}. "
            f"They are kept in {folder.sources / str(newest) / 'code'}",
            f"Bring them back, or go on with the new code by {FLAG}: the tag {CODE_TAG} of each "
            "trial says which it ran. A new --name begins a search of its own",
        )


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between two sets of hashes, a few words a file."""
    words = []
    for name in sorted({**before, **now}):
        if name not in now:
            words.append(f"{name} is no longer imported")
        elif name not in before:
            words.append(f"{name} is new")
        elif before[name] != now[name]:
            words.append(f"{name} has changed")
    return words


def code_of(folder: SearchFolder) -> Path:
    """The folder that the workers of a search import its user's modules from."""
    # A package that Ray unpacked may be gone while the search still runs: its copy is not.
    return folder.code if folder.code.is_dir() else Path.cwd()


def trial_starts(folder: SearchFolder, number: int) -> list[dict[str, str]]:
    """The tags of each start of a trial by its workers' records, the oldest first; empty where
    these cannot be read."""
    try:
        found = bodies_of(folder.root, number)
    except (OutboxError, OSError):
        return []
    # What the driver records when it hands a trial out says nothing of its code.
    return [dict(b.tags) for b in found if isinstance(b, Start) and CODE_TAG in b.tags]


def code_differences(
    folder: SearchFolder, starts: Sequence[Mapping[str, str]], now: Mapping[str, str]
) -> list[str]:
    """In what the code that a trial ran differs from the code now, a few words each.

    Args:
        folder: the search's folder.
        starts: as :func:`trial_starts` gives them.
        now: the hashes of the modules now.
    """
    ran = list(dict.fromkeys(tags[CODE_TAG] for tags in starts if CODE_TAG in tags))
    words = [f"its epochs ran different code ({', '.join(ran)})"] if len(ran) > 1 else []
    known = {code_digest(of["hashes"]): (n, of["hashes"]) for n, of in records(folder).items()}
    for code in ran:
        if code == code_digest(now):
            continue
        if code not in known:
            words.append(f"the code ({code}, of which nothing is kept: edited during the search)")
            continue
        number, before = known[code]
        kept = folder.sources / str(number) / "code"
        words.append(f"{', '.join(changed(before, now))} (what it ran is kept in {kept})")
    return words


def other_differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """In what data, kernels, versions and machine differ between two trainings, by their tags."""
    names = [DATA_TAG, ROWS_TAG, "kernels", COMMIT_TAG, "device_name", "host"]
    names += sorted(name for name in {**before, **now} if name.startswith("version."))
    words = []
    for name in names:
        old, new = before.get(name), now.get(name)
        if None not in (old, new) and old != new:
            short = name.removesuffix(".digest").removeprefix("version.").removeprefix("topotune.")
            words.append(f"{short} was {old}, is {new}")
    return words


def _same(record: Mapping[str, Any], source: Source, home: Path, diff: str) -> bool:
    """Whether a record says of code and repository what a session finds."""
    fresh = source.to_dict()
    try:
        kept = (home / DIFF_FILE).read_text("utf-8") if (home / DIFF_FILE).exists() else ""
    except (OSError, ValueError):
        return False
    return kept == diff and all(record.get(n) == fresh[n] for n in ("hashes", "git", "topotune"))


def _files(home: Path) -> list[Path]:
    found = (path for path in home.rglob("*") if path.is_file())
    return sorted(found, key=lambda path: (path.name != RECORD_FILE or path.parent != home, path))
