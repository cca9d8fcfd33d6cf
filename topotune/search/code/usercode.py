"""A user's own modules that import paths lead to: found and hashed without running any of them.

Two questions are answered. What must go along to a cluster: the whole module or package of each
import path, as far as it lies in the user's folder (:func:`own_modules`). Which code computes a
result: the files that the import statements really lead to, wherever a user keeps them, but for
what is installed (:func:`user_files`). What code imports by a name that it makes up at run time is
found by neither.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path

MAX_FILES = 1000
"""Files that are followed, the nearest to the search first: a whole library that is used from its
sources has more."""
_IMPORT_PATH = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):[A-Za-z_]\w*")
_INSTALLED = re.compile(r"/(?:site|dist)-packages/")


def module_paths(data: object) -> set[str]:
    """The modules of all import paths ``package.module:Name`` in plain data."""
    if isinstance(data, str):
        found = _IMPORT_PATH.fullmatch(data)
        return {found[1]} if found else set()
    if isinstance(data, Mapping):
        return set().union(*map(module_paths, data.values()))
    if isinstance(data, list | tuple):
        return set().union(*map(module_paths, data))
    return set()


def import_paths(data: object) -> set[str]:
    """The top-level modules of all import paths ``package.module:Name`` in plain data."""
    return {module.partition(".")[0] for module in module_paths(data)}


def own_modules(names: Iterable[str], root: Path) -> list[Path]:
    """Files and folders of ``root`` that these top-level modules are, with what they import."""
    found: dict[str, Path] = {}
    queue = list(names)
    while queue:
        name = queue.pop()
        if name in found or (path := _own(name, root)) is None:
            continue
        found[name] = path
        files = [path] if path.is_file() else sorted(path.rglob("*.py"))
        for file in files:
            queue += {module.partition(".")[0] for module in _imported(file, "")}
    return sorted(found.values())


def user_files(modules: Iterable[str], root: Path) -> dict[str, Path]:
    """The files of these modules, of their packages, and of what they import in turn.

    Args:
        modules: full names, such as ``package.module``.
        root: the user's folder, which imports look at last.

    Returns:
        The file by its name as a module, ``package/module.py``, which is the same on every machine.
    """
    found: dict[str, Path] = {}
    places: dict[str, Path | None] = {}
    queue = deque(sorted(modules))
    while queue and len(found) < MAX_FILES:
        parts = queue.popleft().split(".")
        for depth in range(1, len(parts) + 1):
            name, parent = ".".join(parts[:depth]), ".".join(parts[: depth - 1])
            if name in places:
                continue
            path = _inside(places[parent], parts[depth - 1]) if parent else _top(name, root)
            places[name] = path
            if path is not None and path.is_file():
                package = path.name == "__init__.py"
                found[name.replace(".", "/") + ("/__init__.py" if package else ".py")] = path
                queue += sorted(_imported(path, name if package else parent))
    return found


def contents(files: Mapping[str, Path]) -> dict[str, bytes]:
    """What each file holds, by the same names; nothing for one that cannot be read."""
    return {name: _read(path) for name, path in sorted(files.items())}


def hashes(found: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of each of :func:`contents`, by the same names."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def code_digest(found: Mapping[str, str]) -> str:
    """One short name for all of :func:`hashes`; empty where there are no files."""
    if not found:
        return ""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(found.items()))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _elsewhere(root: Path) -> list[str]:
    return [path for path in sys.path if path and Path(path).absolute() != root]


def _own(name: str, root: Path) -> Path | None:
    """A module of the user's folder; None for one that is installed, as an import would find it."""
    if name == "topotune" or name in sys.stdlib_module_names:
        return None
    if PathFinder.find_spec(name, _elsewhere(root)) is not None:
        return None
    package, file = root / name, root / f"{name}.py"
    if package.is_dir() and any(package.rglob("*.py")):
        return package
    return file if file.is_file() else None


def _top(name: str, root: Path) -> Path | None:
    """File (or folder, of a package without code of its own) of a top-level module that is a
    user's: in ``root``, on PYTHONPATH or installed for editing."""
    if name == "topotune" or name in sys.stdlib_module_names:
        return None
    spec = PathFinder.find_spec(name, _elsewhere(root))
    if spec is None or spec.origin is None:  # or folders of that name, which give way to a file
        if (path := _below(root, name)) is not None:
            return path
        try:
            spec = importlib.util.find_spec(name)  # by a hook of an editable installation
        except (ImportError, ValueError, AttributeError):
            return None
    origin = None if spec is None or spec.origin is None else Path(spec.origin)
    if origin is None or origin.suffix != ".py" or _INSTALLED.search(origin.as_posix()):
        return None
    return origin


def _inside(package: Path | None, name: str) -> Path | None:
    """A module of a package, which is given by its file, or its folder where it has none."""
    if package is None or (package.is_file() and package.name != "__init__.py"):
        return None
    return _below(package.parent if package.is_file() else package, name)


def _below(folder: Path, name: str) -> Path | None:
    """A module in a folder as an import would find it there."""
    for path in (folder / name / "__init__.py", folder / f"{name}.py"):
        if path.is_file():
            return path
    return folder / name if (folder / name).is_dir() else None


def _imported(file: Path, package: str) -> set[str]:
    """Full names that a file imports, and those that may be modules or only names in one; none of
    a file that is no Python.

    Args:
        file: the file.
        package: that it lies in, for its relative imports; empty leaves them out.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return set()
    return {name for node in ast.walk(tree) for name in _names(node, package)}


def _names(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            if not package or not above:
                return
            base = ".".join([*above, base] if base else above)
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
