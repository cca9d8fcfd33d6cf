"""Load a user's object by import path, ``package.module:Name``."""

from __future__ import annotations

import importlib
import logging
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TypeVar

from topotune.errors import PluginError, did_you_mean, in_one_line

T = TypeVar("T")
_log = logging.getLogger(__name__)


def is_import_path(name: str) -> bool:
    """Whether a name is an import path and not a registry key."""
    return ":" in name


def load_object(path: str) -> object:
    """Import ``package.module:Name`` and return the object.

    The current directory is importable, as it is for ``python -m``. Importing runs the module's
    code, which is logged (level INFO) before it happens.

    Raises:
        PluginError: the path has no colon, the module does not import (its own error is quoted),
            or the module has no such name.
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise PluginError(
            f"import path {path!r}: expected the form 'package.module:Name', "
            "such as 'my_tasks:Rings'"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: a file there stands in for no library
    if module_name not in sys.modules:
        _log.info("runs code of %s from %s", path, _file_of(module_name))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script without a __main__ guard may exit
        raise PluginError(
            f"import path {path!r}: module {module_name!r} does not import: {in_one_line(error)}. "
            "Modules are looked up in the current directory "
            f"({here}) and in the environment"
        ) from error
    try:
        found: object = getattr(module, attribute)
    except AttributeError:
        names = [n for n in vars(module) if not n.startswith("_")]
        raise PluginError(
            f"import path {path!r}: module {module_name!r} has no {attribute!r}"
            + did_you_mean(attribute, names)
        ) from None
    return found


def _file_of(module_name: str) -> str:
    """The file that an import would run, found without running any."""
    places = None
    name = origin = ""
    for part in module_name.split("."):
        name = f"{name}.{part}" if name else part
        found = PathFinder.find_spec(name, places)
        if found is None:
            return "a module that is not found"
        places, origin = found.submodule_search_locations, found.origin or "a package without code"
    return origin


def load_class(path: str, base: type[T]) -> type[T]:
    """Import a class by path and check that it derives from ``base``.

    Raises:
        PluginError: as :func:`load_object`, or the object is not a subclass of ``base``.
    """
    found = load_object(path)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(
            f"import path {path!r}: expected a subclass of {base.__module__}.{base.__qualname__}, "
            f"got {found!r}"
        )
    return found
