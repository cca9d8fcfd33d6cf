"""Classes that a user names: found in a registry or by import path, called with options."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TypeVar

from topotune.errors import (
    ConfigError,
    PluginError,
    TopotuneError,
    UnknownNameError,
    did_you_mean,
    in_one_line,
)

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


def find_class(kind: str, name: object, known: Mapping[str, type[T]], base: type[T]) -> type[T]:
    """The class that a name stands for: a registry's entry, or a subclass by import path.

    Args:
        kind: what is named, for messages.
        name: ``package.module:Class`` or a key of ``known``.
        known: the registry.
        base: what a class by import path must derive from.

    Raises:
        UnknownNameError: neither an entry nor an import path.
        PluginError: as :func:`load_class`.
    """
    if isinstance(name, str) and is_import_path(name):
        return load_class(name, base)
    if not isinstance(name, str) or name not in known:
        raise UnknownNameError(kind, str(name), known, "or an import path, package.module:Class")
    return known[name]


def accepted_names(constructor: Callable[..., object]) -> tuple[list[str], bool]:
    """The keyword arguments that a constructor names, and whether it takes any other as well."""
    names, takes_any = [], False
    for parameter in inspect.signature(constructor).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind in (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        ):
            names.append(parameter.name)
    return names, takes_any


def call_with_options(
    constructor: Callable[..., T],
    options: Mapping[str, object],
    *,
    place: str,
    what: str,
    facts: Mapping[str, object] | None = None,
) -> T:
    """Call ``constructor`` with a user's options and with facts that the user may not set.

    Args:
        constructor: a class or function with named parameters.
        options: what the user wrote.
        place: where the options stand, such as ``task.options``.
        what: the thing being built, for messages, such as ``task 'digits'``.
        facts: values that the caller determines (shapes, the number of classes); those that the
            constructor does not take are left out.

    Raises:
        ConfigError: an option is unknown, or set by the caller, or missing, or the constructor
            itself raises.
    """
    names, takes_any = accepted_names(constructor)
    known = [name for name in names if name not in (facts or {})]
    for option in options:
        if facts and option in facts:
            raise ConfigError(
                f"{place}.{option}",
                f"the data determine this value for {what} (got {options[option]!r})",
                "Remove the option",
            )
        if option not in known and not takes_any:
            raise ConfigError(
                f"{place}.{option}",
                f"{what} has no option {option!r}" + did_you_mean(option, known),
                "" if known else "It takes no options",
            )
    given = {name: value for name, value in (facts or {}).items() if name in names}
    arguments = {**given, **options}
    for parameter in inspect.signature(constructor).parameters.values():
        required = parameter.default is inspect.Parameter.empty
        if required and parameter.name in names and parameter.name not in arguments:
            raise ConfigError(
                f"{place}.{parameter.name}", f"{what} needs this option", "Give it a value"
            )
    try:
        return constructor(**arguments)
    except TopotuneError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(place, f"{what} rejects {dict(options)!r}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(
            place, f"{what} rejects {dict(options)!r}: {in_one_line(error)}"
        ) from error


def whole_number(place: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` if it is an integer of at least ``low`` and, if given, at most ``high``.

    Raises:
        ConfigError: otherwise; booleans are no numbers here.
    """
    rule = f"at least {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(place, f"must be a whole number, {rule} (got {value!r})")
    if value < low or (high is not None and value > high):
        raise ConfigError(place, f"must be {rule} (got {value})")
    return value
