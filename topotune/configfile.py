"""Read YAML with the line of every key, and turn every complaint into a ConfigError.

Plain scalars follow YAML 1.2's core schema, not PyYAML's 1.1: ``1e-3`` is a number, ``on`` and
``2026-01-01`` are text. Duplicate keys, unknown tags, and files that are too large, too deep or
that unfold (aliases) to too many nodes are refused.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from topotune.config import SearchConfig
from topotune.config_rules import RuleError
from topotune.errors import ConfigError, did_you_mean
from topotune.records import OverheadOptions, TrainOptions, TrialSpec

Place = tuple[str | int, ...]
Lines = dict[Place, int]

MAX_BYTES = 1_000_000
MAX_DEPTH = 30
MAX_NODES = 50_000

_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
}
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")
}


class _Reader:
    """Builds plain values from YAML nodes and notes where each stands."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: Lines = {}
        self.nodes = 0

    def error(self, node: yaml.Node, problem: str, fix: str = "") -> ConfigError:
        return ConfigError(f"{self.source}:{node.start_mark.line + 1}", problem, fix)

    def value(self, node: yaml.Node, place: Place) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.error(node, f"the file unfolds to more than {MAX_NODES} values")
        if len(place) > MAX_DEPTH:
            raise self.error(node, f"nested deeper than {MAX_DEPTH} levels")
        self.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self.mapping(node, place)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(item, (*place, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN_TAGS:
            return self.scalar(node)
        raise self.error(node, f"tag {node.tag!r} is not allowed", "Use plain YAML values")

    def mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise self.error(key_node, "keys must be text", "Put quotes around the key")
            if key in found:
                raise self.error(key_node, f"key {key!r} stands twice in one block")
            self.lines[(*place, key)] = key_node.start_mark.line + 1
            found[key] = self.value(value_node, (*place, key))
        return found

    def scalar(self, node: yaml.ScalarNode) -> str | int | float | bool | None:
        text: str = node.value
        if node.style is not None:  # quoted or block text
            return text
        if text in _WORDS:
            return _WORDS[text]
        if len(text) < 400:
            if _INT.fullmatch(text):
                return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
            if _FLOAT.fullmatch(text):
                return float(text)
        return text


def read_yaml(path: Path) -> tuple[Any, Lines]:
    """The file's content and the line of every place in it.

    Raises:
        ConfigError: the file is missing, unreadable, too large, not UTF-8 or not YAML.
    """
    source = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(source, "there is no such file", _suggest_file(path)) from None
    except IsADirectoryError:
        raise ConfigError(source, "is a folder, not a file") from None
    except OSError as error:
        raise ConfigError(source, f"cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(source, f"is larger than {MAX_BYTES} bytes")
    return parse_yaml(raw, source)


def parse_yaml(raw: bytes, source: str) -> tuple[Any, Lines]:
    """As :func:`read_yaml`, from bytes."""
    reader = _Reader(source)
    try:
        node = yaml.compose(raw.decode("utf-8"), Loader=yaml.SafeLoader)
        value = None if node is None else reader.value(node, ())
    except UnicodeDecodeError as error:
        raise ConfigError(source, f"is not UTF-8 text (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(place, f"is not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(source, f"is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(source, f"nested deeper than {MAX_DEPTH} levels") from None
    return value, reader.lines


def load_search(path: Path) -> SearchConfig:
    """The search file at ``path``.

    Raises:
        ConfigError: with file, line, key, rule and fix of the first (and count of further)
            problems.
    """
    data, lines = read_yaml(path)
    return parse_search(data, str(path), lines)


def parse_search(data: object, source: str, lines: Lines) -> SearchConfig:
    """A search config from plain data; errors name ``source`` and the line."""
    if not isinstance(data, dict):
        raise ConfigError(
            source,
            f"a search file is a mapping (got {type(data).__name__})",
            "'topotune schema' prints what it may hold",
        )
    try:
        return SearchConfig.model_validate(data)
    except ValidationError as error:
        raise _translate(error, source, lines, data, _search_schema()) from None


# A misspelt key of a training config must fail, not vanish: pydantic reads this attribute.
for _record in (TrialSpec, TrainOptions, OverheadOptions):
    setattr(_record, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010
_SPEC = TypeAdapter(TrialSpec)


def load_spec(path: Path) -> TrialSpec:
    """A resolved training config, as ``topotune export`` writes it.

    Raises:
        ConfigError: as :func:`load_search`.
    """
    data, lines = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(str(path), f"a training config is a mapping (got {type(data).__name__})")
    if "space" in data or "budget" in data:
        raise ConfigError(
            str(path), "this is a search file, not a training config", "Run 'topotune search' on it"
        )
    try:
        return _SPEC.validate_python(data)
    except ValidationError as error:
        raise _translate(error, str(path), lines, data, _spec_schema()) from None


@functools.cache
def _search_schema() -> dict[str, Any]:
    return SearchConfig.model_json_schema()


@functools.cache
def _spec_schema() -> dict[str, Any]:
    return _SPEC.json_schema()


_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # of a model, of a dataclass


def _suggest_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")], n=1)
    return f"Did you mean {str(folder / near[0])!r}?" if near else ""


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
    shown = repr(value)
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
    return [leaf for one in inner for leaf in _unfold(one, root)] if inner else [option]
