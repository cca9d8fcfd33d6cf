"""A git repository as git describes it: commit, branch, address, and what is not committed.

Nothing of the repository is run (no hook, no external diff, no file-system monitor) or changed (no
lock, no refreshed index). Without git, a repository or a commit there is no description.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from topotune import __version__
from topotune.redaction import redact

COMMIT_TAG = "topotune.commit"
MAX_DIFF = 2**20
"""Bytes of a diff that are kept."""
_SECONDS = 10.0
_MAX_LINE = 500
_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
"""Variables of a git hook, which name another repository than the folder's."""


@dataclass(frozen=True)
class Repository:
    """How a repository stands.

    Attributes:
        commit: of HEAD, in full.
        branch: empty on none.
        url: of the remote ``origin``, without secrets; empty without one.
        diff: of all tracked files against HEAD, without secrets, cut at :data:`MAX_DIFF`.
    """

    commit: str
    branch: str = ""
    url: str = ""
    diff: str = ""

    @property
    def dirty(self) -> bool:
        """Whether tracked files differ from the commit."""
        return bool(self.diff)

    @classmethod
    def of(cls, folder: Path) -> Self | None:
        """The repository that a folder lies in; None outside of any."""
        commit = _line(folder, "rev-parse", "--verify", "HEAD")
        if not commit:
            return None
        diff = _git(folder, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
        if diff is None:
            diff = b"(not known: git gave no answer)\n"
        text = redact(diff[:MAX_DIFF].decode("utf-8", "backslashreplace"))
        if len(diff) > MAX_DIFF:
            text += f"\n(cut here: more than {MAX_DIFF >> 20} MiB)\n"
        return cls(
            commit=commit,
            branch=_line(folder, "symbolic-ref", "--quiet", "--short", "HEAD"),
            url=redact(_line(folder, "config", "--get", "remote.origin.url")),
            diff=text,
        )

    def to_dict(self) -> dict[str, str]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Self | None:
        """The inverse of :meth:`to_dict`, of what others may have written; None of another form."""
        names = ("commit", "branch", "url", "diff")
        if not isinstance(data, dict) or not all(isinstance(data.get(n), str) for n in names):
            return None
        return cls(**{name: data[name] for name in names})


def own_version() -> str:
    """topotune's version, with the commit that it runs from if there is one."""
    return f"{__version__} ({commit})" if (commit := own_commit()) else __version__


def own_tags() -> dict[str, str]:
    """The tag that says which commit topotune runs from; none where it is not checked out."""
    return {COMMIT_TAG: commit} if (commit := own_commit()) else {}


@functools.cache
def own_commit() -> str:
    """The commit that topotune itself runs from, ``-changed`` after it where its files differ from
    that; empty where it is installed and not checked out."""
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists():
        return ""
    commit = _line(folder, "rev-parse", "--verify", "HEAD")
    changed = commit and _git(folder, "status", "--porcelain", "--", str(folder))
    return commit + ("-changed" if changed else "")


def _line(folder: Path, *arguments: str) -> str:
    found = (_git(folder, *arguments) or b"").decode("utf-8", "replace").strip()
    return "" if "\n" in found else found[:_MAX_LINE]


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git prints, up to a little more than a diff's bound; None where it fails."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in _ELSEWHERE}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        with tempfile.TemporaryFile() as out:  # a diff may be larger than the memory
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.DEVNULL,
                env=environment,
                timeout=_SECONDS,
                check=False,
            )
            out.seek(0)
            return out.read(MAX_DIFF + 1) if done.returncode == 0 else None
    except (OSError, subprocess.SubprocessError):
        return None
