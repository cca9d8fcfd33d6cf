"""Which files a user's import paths lead to, their hashes, and the repository that they lie in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from topotune.repository import MAX_DIFF, Repository, own_commit
from topotune.search.code.usercode import code_digest, contents, hashes, module_paths, user_files


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def user(tmp_path: Path) -> Path:
    return write(
        tmp_path / "user",
        {
            "own_task.py": "import torch, json\nfrom own_helper import x\nimport topotune\n",
            "own_helper.py": "def late():\n    from own_parts.deep import inner\n",
            "own_parts/__init__.py": "",
            "own_parts/deep/__init__.py": "from ..beside import name\nfrom . import near\n",
            "own_parts/deep/inner.py": "import own_task  # a circle\nimport own_plain.part\n",
            "own_parts/deep/near.py": "from .... import too_far_up\n",
            "own_parts/beside.py": "name = 1\n",
            "own_parts/unused.py": "name = 1\n",
            "own_plain/part.py": "syntax error here(\n",
            "unrelated.py": "",
            "torch.py": "",  # an import finds the installed one
            "json.py": "",
        },
    )


FOUND = {
    "own_task.py",
    "own_helper.py",
    "own_parts/__init__.py",
    "own_parts/deep/__init__.py",
    "own_parts/deep/inner.py",
    "own_parts/deep/near.py",
    "own_parts/beside.py",
    "own_plain/part.py",
}


def test_exactly_the_files_that_imports_lead_to_are_found(user: Path) -> None:
    found = user_files(["own_task"], user)
    assert set(found) == FOUND
    assert all(path == user / name for name, path in found.items())
    assert user_files(["json", "torch", "topotune.optim", "not_there", "own_task.inner"], user) == {
        name: user / name for name in FOUND
    }
    assert user_files([], user) == {}


def test_a_library_that_is_used_from_its_sources_is_the_users(
    user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = write(tmp_path / "library", {"own_library/__init__.py": ""})
    packages = tmp_path / "site-packages"
    installed = write(packages, {"own_installed.py": "", "own_parts/data.txt": ""})
    monkeypatch.setattr(sys, "path", [str(installed), str(library), *sys.path])
    found = user_files(["own_library", "own_installed", "own_parts.beside"], user)
    assert found == {
        "own_library/__init__.py": library / "own_library/__init__.py",
        "own_parts/__init__.py": user / "own_parts/__init__.py",  # not the folder without code
        "own_parts/beside.py": user / "own_parts/beside.py",
    }


def test_the_digest_follows_content_and_names_and_nothing_else(user: Path) -> None:
    def digest() -> str:
        return code_digest(hashes(contents(user_files(["own_task"], user))))

    first = digest()
    assert len(first) == 12
    (user / "unrelated.py").write_text("changed = 1\n")
    (user / "own_helper.py").touch()
    assert digest() == first
    (user / "own_parts/beside.py").write_text("name = 2\n")
    assert digest() != first
    (user / "own_parts/beside.py").write_text("name = 1\n")
    assert digest() == first
    assert code_digest({}) == ""
    assert code_digest({"a.py": "1", "b.py": "2"}) != code_digest({"a.py": "2", "b.py": "1"})


def test_import_paths_name_whole_modules() -> None:
    data = {"task": {"name": "one.inner:Task"}, "list": ["two:Field", 3, None], "text": "a:b c:D"}
    assert module_paths(data) == {"one.inner", "two"}


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=ada", "-c", "user.email=ada@example.org"]
    done = subprocess.run(
        ["git", *who, "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_repository_tells_commit_branch_address_and_diff(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWN_TOKEN", "hunter2hunter2")
    assert Repository.of(user) is None
    git(user, "init", "-q", "-b", "trunk")
    assert Repository.of(user) is None  # nothing is committed yet
    git(user, "add", "-A")
    git(user, "commit", "-q", "-m", "first")
    found = Repository.of(user)
    assert found == Repository(git(user, "rev-parse", "HEAD"), "trunk")
    assert not found.dirty

    git(user, "remote", "add", "origin", "https://ada:hunter2@host.example/own.git")
    (user / "own_helper.py").write_text("key = 'hunter2hunter2'\n")
    (user / "untracked.py").write_text("")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # of a hook that starts a search
    found = Repository.of(user / "own_parts")
    assert found is not None
    assert found.dirty
    assert found.url == "https://***@host.example/own.git"
    assert "+key = '***'" in found.diff
    assert "untracked" not in found.diff
    assert Repository.from_dict(found.to_dict()) == found
    assert Repository.from_dict({"commit": 1}) is None
    assert Repository.from_dict(None) is None


def test_a_large_diff_is_cut_and_nothing_of_the_repository_is_run(user: Path) -> None:
    git(user, "init", "-q")
    git(user, "add", "-A")
    git(user, "commit", "-q", "-m", "first")
    planted = user / "planted"
    program = write(user, {"program": f"#!/bin/sh\ntouch {planted}\n"}) / "program"
    program.chmod(0o755)
    for name in ("diff.external", "core.fsmonitor", "core.pager", "diff.own.textconv"):
        git(user, "config", name, str(program))
    (user / ".gitattributes").write_text("*.py diff=own\n")
    (user / "own_task.py").write_text("x = 1\n" * (MAX_DIFF // 4))
    git(user, "checkout", "-q", "--detach")
    planted.unlink(missing_ok=True)  # git itself ran what it was told to
    found = Repository.of(user)
    assert found is not None
    assert found.branch == ""
    assert found.diff.endswith("(cut here: more than 1 MiB)\n")
    assert len(found.diff) < MAX_DIFF + 100
    assert not planted.exists()


def test_without_git_nothing_is_told(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(user, "init", "-q")
    git(user, "add", "-A")
    git(user, "commit", "-q", "-m", "first")
    monkeypatch.setenv("PATH", "")
    assert Repository.of(user) is None


def test_the_own_commit_is_that_of_the_checkout() -> None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        assert own_commit() == ""
        return
    assert own_commit().removesuffix("-changed") == git(root, "rev-parse", "HEAD")
