"""Search files and training configs: every complaint of pydantic as a ConfigError with its line."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from topotune.config import SAVED, SearchConfig, json_schema
from topotune.config_rules import RuleError
from topotune.errors import ConfigError, did_you_mean
from topotune.records import OverheadOptions, TrainOptions, TrialSpec
from topotune.redaction import names_secret, redact
from topotune.yamlfile import HALF, Lines, Place, parse_yaml, read_yaml

__all__ = ["load_search", "load_spec", "parse_search", "parse_spec", "parse_yaml", "read_yaml"]


def load_search(path: Path) -> SearchConfig:
    """The search file at ``path``.

    Raises:
        ConfigError: with file, line, key, rule and fix of the first (and count of further)
            problems.
    """
    data, lines = read_yaml(path)
    return parse_search(data, str(path), lines)


def parse_search(data: object, source: str, lines: Lines, *, saved: bool = False) -> SearchConfig:
    """A search config from plain data; errors name ``source`` and the line.

    Args:
        data: a mapping of plain data.
        source: where it was read.
        lines: the line of each key.
        saved: it is of a search that exists, where a secret is no longer refused.
    """
    if not isinstance(data, dict):
        raise ConfigError(
            source,
            f"a search file is a mapping (got {type(data).__name__})",
            "'topotune schema' prints what it may hold",
        )
    try:
        return SearchConfig.model_validate(data, context=SAVED if saved else None)
    except ValidationError as error:
        raise _translate(error, source, lines, data, _search_schema()) from None
    except UnicodeEncodeError:  # of a rule's message; YAML has named the line before
        raise ConfigError(source, HALF) from None


# A misspelt key of a training config must fail, not vanish, and a number must be one that a
# checkpoint can state: pydantic reads this attribute.
for _record in (TrialSpec, TrainOptions, OverheadOptions):
    setattr(_record, "__pydantic_config__", ConfigDict(extra="forbid", allow_inf_nan=False))  # noqa: B010
_SPEC = TypeAdapter(TrialSpec)


def load_spec(path: Path) -> TrialSpec:
    """A resolved training config, as ``topotune export`` writes it.

    Raises:
        ConfigError: as :func:`load_search`.
    """
    data, lines = read_yaml(path)
    return parse_spec(data, str(path), lines)


def parse_spec(data: object, source: str, lines: Lines) -> TrialSpec:
    """A training config from plain data; errors name ``source`` and the line."""
    if not isinstance(data, dict):
        raise ConfigError(source, f"a training config is a mapping (got {type(data).__name__})")
    if "space" in data or "budget" in data:
        raise ConfigError(
            source, "this is a search file, not a training config", "Run 'topotune search' on it"
        )
    try:
        return _SPEC.validate_python(data)
    except ValidationError as error:
        raise _translate(error, source, lines, data, _spec_schema()) from None
    except UnicodeEncodeError:
        raise ConfigError(source, HALF) from None


@functools.cache
def _search_schema() -> dict[str, Any]:
    return json_schema()


@functools.cache
def _spec_schema() -> dict[str, Any]:
    return _SPEC.json_schema()


_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # of a model, of a dataclass


def _translate(
    error: ValidationError, source: str, lines: Lines, data: Any, schema: dict[str, Any]
) -> ConfigError:
    """The most telling problem as place, rule and fix, and how many other places have one."""
    found: dict[Place, list[str]] = {}
    # An unknown key often is the missing one, misspelt: it goes first.
    for problem in sorted(
        error.errors(include_url=False), key=lambda p: p["type"] not in _UNKNOWN_KEY
    ):
        cause = problem.get("ctx", {}).get("error")
        raw = cause.path if isinstance(cause, RuleError) else tuple(problem["loc"])
        kind = "missing" if isinstance(cause, RuleError) else problem["type"]
        place = tuple(_existing(raw, data, kind))
        found.setdefault(place, []).append(_message(problem, place, schema))
    place, messages = next(iter(found.items()))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    at = f"{source}:{_line(place, lines)}" if _line(place, lines) else source
    return ConfigError(
        f"{at}: {_dotted(place)}" if place else at, " or ".join(dict.fromkeys(messages)) + more
    )


def _existing(place: Place, data: Any, kind: str) -> Iterator[str | int]:
    """The part of a pydantic location that is in the file: union tags drop out."""
    here = data
    last = len(place) - 1
    for index, key in enumerate(place):
        if isinstance(here, dict) and isinstance(key, str):
            if key in here:
                here = here[key]
                yield key
            elif index == last and kind in ("missing", *_UNKNOWN_KEY):
                yield key
        elif isinstance(here, list) and isinstance(key, int) and key < len(here):
            here = here[key]
            yield key


def _dotted(place: Place) -> str:
    text = ""
    for key in place:
        text += f"[{key}]" if isinstance(key, int) else (f".{key}" if text else key)
    return text


def _line(place: Place, lines: Lines) -> int:
    """The line of the place or of the nearest block around it; 0 if unknown."""
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place, 0)


def _message(problem: Any, place: Place, schema: dict[str, Any]) -> str:
    kind, value = problem["type"], problem.get("input")
    if kind in _UNKNOWN_KEY:
        return (
            f"unknown key {place[-1]!r}{did_you_mean(str(place[-1]), _keys_at(place[:-1], schema))}"
        )
    if kind == "missing":
        return "is required"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = value.get("type") if isinstance(value, dict) else None
        kinds = ("float", "int", "categorical")
        if tag is None:
            return "needs a type: float, int or categorical"
        return f"unknown parameter type {tag!r}{did_you_mean(str(tag), kinds)}"
    if kind in ("value_error", "assertion_error"):
        return str(problem["ctx"]["error"])
    hidden = any(isinstance(key, str) and names_secret(key) for key in place)
    shown = "***" if hidden else redact(repr(value))
    shown = shown if len(shown) < 80 else shown[:77] + "..."
    text: str = problem["msg"]
    return f"{text[0].lower()}{text[1:]} (got {shown})"


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
