"""Check what a user wrote against what a constructor takes, before it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

from topotune.errors import ConfigError, TopotuneError, did_you_mean, in_one_line

T = TypeVar("T")


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
