"""What is wrong with a search file or a training config, in words: every fault with its line."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from pydantic import ValidationError

from topotune.config.rules import Broken, Place
from topotune.errors import ConfigError, FaultsError, FieldError, combined, did_you_mean, dotted
from topotune.redaction import names_secret, redact

Lines: TypeAlias = dict[Place, int]
"""The path of a key to its line in the file."""
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # of a model, of a dataclass


def faults_of(error: ValidationError, data: Any, schema: dict[str, Any]) -> list[FieldError]:
    """Each place that has a fault, once, with its rule and fix."""
    found: list[Broken] = []
    missing: list[Broken] = []
    for problem in error.errors(include_url=False):
        kind = problem["type"]
        if kind == "too_short" and problem["input"]:
            continue  # its items have faults, which are named
        with_last = kind in ("missing", *_UNKNOWN_KEY)
        place = tuple(_existing(tuple(problem["loc"]), data, with_last))
        table = missing if kind == "missing" else found
        table.append((place, _message(problem, place, schema)))
    # An unknown key often is the missing one, misspelt: it goes first.
    return _merged([*found, *missing])


def placed(broken: Iterable[Broken], data: Any) -> list[FieldError]:
    """Broken rules as faults of the file that holds this data."""
    return _merged((tuple(_existing(path, data, True)), problem) for path, problem in broken)


def _merged(faults: Iterable[Broken]) -> list[FieldError]:
    """Each place once."""
    texts: dict[Place, list[str]] = {}
    for place, text in faults:
        texts.setdefault(place, []).append(text)
    return [
        FieldError(place, " or ".join(dict.fromkeys(messages))) for place, messages in texts.items()
    ]


_STAND_INS: dict[str, Any] = {
    "name": "stand-in",
    "task": "digits",
    "method": "adam",
    "space": {"lr": {"type": "float", "low": 1e-4, "high": 1e-2}},
    "objective": {"metric": "val_loss", "direction": "minimize"},
    "budget": {"trials": 1, "epochs": 1_000_000},
}


def sound_part(
    data: dict[str, Any], faults: Sequence[FieldError]
) -> tuple[dict[str, Any], Callable[[FieldError], bool]]:
    """A search file without what has faults, to see what else is wrong with it.

    Returns:
        The rest, in which ordinary values stand for what is required; and whether a fault of the
        rest is one of the file, and not due to what was left out.
    """
    rest = copy.deepcopy(data)
    blocks: set[str | int] = set()
    names: set[str | int] = set()
    for fault in faults:
        block, *inner = fault.path or ("",)
        entries = rest.get(str(block))
        if inner and block in ("space", "fixed", "constraints") and isinstance(entries, dict):
            entries.pop(inner[0], None)
            names.add(inner[0])
        else:
            rest.pop(str(block), None)
            blocks.add(block)
    for name, value in _STAND_INS.items():
        if not rest.get(name):
            rest[name] = value
            blocks.add(name)
    if blocks & {"task", "method"} or any(str(name).startswith("task.") for name in names):
        blocks |= {"objective", "constraints"}  # which metrics there are depends on these

    def real(fault: FieldError) -> bool:
        block, *inner = fault.path or ("",)
        return bool(block) and block not in blocks and not names & set(inner)

    return rest, real


def with_lines(faults: list[FieldError], source: str, lines: Lines) -> ConfigError:
    """All faults of a file as one error, each with its line, in the file's order."""
    ordered = sorted(
        faults, key=lambda fault: (fault.problem == _MISSING, _line(fault.path, lines))
    )
    return combined(_with_line(fault, source, lines) for fault in ordered)


@contextmanager
def located(source: str, lines: Lines) -> Iterator[None]:
    """Add the file and the line to errors about places in it that are raised within.

    Raises:
        ConfigError: as it was raised, its place being one in the file.
    """
    try:
        yield
    except FieldError as error:
        raise with_lines([error], source, lines) from error
    except FaultsError as error:
        faults = [fault for fault in error.faults if isinstance(fault, FieldError)]
        raise (with_lines(faults, source, lines) if faults else error) from error


def _with_line(fault: FieldError, source: str, lines: Lines) -> ConfigError:
    line = _line(fault.path, lines)
    at = f"{source}:{line}" if line else source
    path = fault.path
    if path[1:] == ("name",) and path not in lines and path[:1] in lines:
        path = path[:1]  # a bare name stands for the block
    return ConfigError(f"{at}: {dotted(path)}" if path else at, fault.problem, fault.fix)


def _existing(place: Place, data: Any, with_last: bool) -> Iterator[str | int]:
    """The part of a pydantic location that is in the file, the names of union types left out.

    Args:
        place: the location.
        data: the file's content.
        with_last: whether the last key belongs to the place where the file lacks it.
    """
    here = data
    last = len(place) - 1
    for index, key in enumerate(place):
        if isinstance(here, dict) and isinstance(key, str):
            if key in here:
                here = here[key]
                yield key
            elif index == last and with_last:
                yield key
        elif isinstance(here, list) and isinstance(key, int) and key < len(here):
            here = here[key]
            yield key


def _line(place: Place, lines: Lines) -> int:
    """The line of the place or of the nearest block around it; 0 if unknown."""
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place, 0)


_MISSING = "is required"
_BLOCK = ("model_type", "model_attributes_type", "dict_type", "dataclass_type")
_SCALARS = "must be text, a number, true, false or null"
_LOG_TYPES = ("loguniform", "log", "log_uniform", "logfloat", "logint", "lognormal")
_OTHER_TYPES = {
    **dict.fromkeys(("uniform", "number", "real", "double"), "float"),
    **dict.fromkeys(("integer", "randint", "quniform", "range"), "int"),
    **dict.fromkeys(("choice", "choices", "enum", "category", "str", "string"), "categorical"),
}


def _message(problem: Any, place: Place, schema: dict[str, Any]) -> str:
    kind, value = problem["type"], problem.get("input")
    if kind in _UNKNOWN_KEY:
        known = _keys_at(place[:-1], schema)
        return f"unknown key {place[-1]!r}{did_you_mean(str(place[-1]), known)}"
    if kind == "missing":
        return _MISSING
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _parameter_type(value)
    if kind in ("value_error", "assertion_error"):
        return str(problem["ctx"]["error"])
    hidden = any(isinstance(key, str) and names_secret(key) for key in place)
    shown = "***" if hidden else redact(repr(value))
    shown = shown if len(shown) < 80 else shown[:77] + "..."
    if place[:1] == ("space",) and len(place) == 2 and kind in _BLOCK:
        return f"{_parameter(value)} (got {shown})"
    if "choices" in place[:-1] and isinstance(value, list | dict):
        return (
            f"each choice {_SCALARS} (got {shown}). Give each a name, such as choices: [small, "
            "large], that your task or optimizer knows; betas are searched as beta1 and beta2"
        )
    if isinstance(value, bool | int | float) and (
        kind == "string_type" or (kind in _BLOCK and place[:1] in _NAMED)
    ):
        return f"must be text; put it in quotes (got {shown})"
    if kind in _BLOCK:
        keys = ", ".join(_keys_at(place, schema))
        return f"must be a block{f' of the keys {keys}' if keys else ''} (got {shown})"
    if kind in ("tuple_type", "list_type") and not isinstance(value, list):
        return f"must be a list, such as [{shown}] (got {shown})"
    text: str = problem["msg"]
    return f"{text[0].lower()}{text[1:]} (got {shown})"


_NAMED = (("task",), ("model",), ("sampler",), ("pruner",))
"""Blocks for which a bare name stands."""


def _parameter_type(value: Any) -> str:
    """What is wrong with the type of a searched parameter."""
    tag = value.get("type") if isinstance(value, dict) else None
    if tag is None:
        return "needs a type: float, int or categorical"
    name, text = str(tag), f"unknown parameter type {tag!r}"
    if name in _LOG_TYPES:
        return f"{text}; write type: {'int' if 'int' in name else 'float'} with log: true"
    if name in _OTHER_TYPES:
        return f"{text}; write type: {_OTHER_TYPES[name]}"
    return text + did_you_mean(name, ("float", "int", "categorical"))


def _parameter(value: Any) -> str:
    """How a searched parameter is written that is no block of keys."""
    numbers = [item for item in value if _is_number(item)] if isinstance(value, list) else []
    if isinstance(value, list) and len(numbers) == len(value) == 2:
        low, high = sorted(numbers)
        kind = "int" if isinstance(low, int) and isinstance(high, int) else "float"
        return (
            f"a range is written {{type: {kind}, low: {low}, high: {high}}}, with log: true for a "
            f"log scale; two choices {{type: categorical, choices: {value}}}"
        )
    if isinstance(value, list):
        return "choices are written {type: categorical, choices: [...]}"
    return "needs a type: float, int or categorical; a value that is not searched belongs to fixed"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _keys_at(place: Place, schema: dict[str, Any]) -> list[str]:
    """The legal keys of the block at ``place``, from the models themselves."""
    options = _unfold(schema, schema)
    for key in place:
        options = [step for option in options for step in _descend(option, key, schema)]
    return sorted({name for option in options for name in option.get("properties", {})})


def _descend(option: dict[str, Any], key: str | int, root: dict[str, Any]) -> list[dict[str, Any]]:
    if isinstance(key, int):
        nexts = [option["items"]] if "items" in option else []
    elif key in option.get("properties", {}):
        nexts = [option["properties"][key]]
    else:
        extra = option.get("additionalProperties")
        nexts = [extra] if isinstance(extra, dict) else []
    return [leaf for found in nexts for leaf in _unfold(found, root)]


def _unfold(option: dict[str, Any], root: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in option:
        return _unfold(root["$defs"][option["$ref"].rsplit("/", 1)[1]], root)
    inner = [*option.get("anyOf", ()), *option.get("oneOf", ()), *option.get("allOf", ())]
    found = [leaf for one in inner for leaf in _unfold(one, root)]
    return [*found, option] if "properties" in option or not inner else found
