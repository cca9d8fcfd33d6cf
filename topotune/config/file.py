"""Read search files and training configs: YAML with the line of every key.

A file that is no plain YAML raises a ConfigError. Plain scalars follow YAML 1.2's core schema, not
PyYAML's 1.1: ``1e-3`` is a number, ``on`` and ``2026-01-01`` are text. Duplicate keys, unknown
tags, and files that are too large, too deep or that unfold (aliases) to too many values are
refused.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from topotune.config.faults import Lines, faults_of, placed, sound_part, with_lines
from topotune.config.models import SearchConfig, json_schema
from topotune.config.rules import Place, broken_rules
from topotune.config.spaces import near_files
from topotune.errors import ConfigError, FieldError
from topotune.records import OverheadOptions, TrainOptions, TrialSpec

MAX_BYTES = 1_000_000
MAX_DEPTH = 30
MAX_NODES = 20_000

_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_HALF = re.compile("[\ud800-\udfff]")
HALF = "a text with half a character (a lone surrogate), which no file can hold"
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


class _Loader(yaml.SafeLoader):
    """Stops at too many values before all of them are read: a megabyte takes half a minute."""

    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.composed += 1
        if self.composed > MAX_NODES:
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise _TooManyError(line)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


class _TooManyError(Exception):
    """The file holds more than MAX_NODES values, at this line."""


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
        if _HALF.search(text):
            raise self.error(node, HALF, "Write the whole character")
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
        fix = "".join(f"Did you mean {name!r}?" for name in near_files(path))
        raise ConfigError(source, "there is no such file", fix) from None
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
        node = yaml.compose(raw.decode("utf-8"), Loader=_Loader)
        value = None if node is None else reader.value(node, ())
    except UnicodeDecodeError as error:
        raise ConfigError(source, f"is not UTF-8 text (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(place, f"is not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(source, f"is not YAML: {' '.join(str(error).split())}") from None
    except _TooManyError as error:
        place = f"{source}:{error}"
        raise ConfigError(place, f"the file holds more than {MAX_NODES} values") from None
    except RecursionError:
        raise ConfigError(source, f"nested deeper than {MAX_DEPTH} levels") from None
    return value, reader.lines


def load_search(path: Path) -> SearchConfig:
    """The search file at ``path``.

    Raises:
        ConfigError: with file, line, key, rule and fix; of several faults a FaultsError.
    """
    data, lines = read_yaml(path)
    return parse_search(data, str(path), lines)


def parse_search(
    data: object,
    source: str,
    lines: Lines,
    *,
    saved: bool = False,
    also: Callable[[SearchConfig], list[FieldError]] = lambda part: [],
) -> SearchConfig:
    """A search config from plain data; errors name ``source`` and the line.

    Args:
        data: a mapping of plain data.
        source: where it was read.
        lines: the line of each key.
        saved: it is of a search that exists, where what only a new search is refused for, such as
            a secret, no longer stops it.
        also: finds what is wrong beyond the file's own rules; asked about the sound part of a file
            that has faults, so that all are seen at once.
    """
    if not isinstance(data, dict):
        raise ConfigError(
            source,
            f"a search file is a mapping (got {type(data).__name__})",
            "'topotune schema' prints what it may hold",
        )
    _check_characters(data, source)
    config, faults = _validated(data, saved)
    if config is None:
        faults += _further(data, faults, also)
        raise with_lines(faults, source, lines)
    return config


def _check_characters(data: object, source: str) -> None:
    """Refuse half a character in what was not read as YAML, whose reader names its line."""
    if _HALF.search(json.dumps(data, ensure_ascii=False, default=str)):
        raise ConfigError(source, HALF)


def _validated(
    data: dict[str, Any], saved: bool = False
) -> tuple[SearchConfig | None, list[FieldError]]:
    """The search, or all its faults: those of single blocks, else those between blocks."""
    try:
        config = SearchConfig.model_validate(data)
    except ValidationError as error:
        return None, faults_of(error, data, _search_schema())
    faults = placed(broken_rules(config, saved=saved), data)
    return (None if faults else config), faults


def _further(
    data: dict[str, Any],
    faults: list[FieldError],
    also: Callable[[SearchConfig], list[FieldError]],
) -> list[FieldError]:
    """Faults of the part of a file that has none of these."""
    found: list[FieldError] = []
    while True:
        rest, real = sound_part(data, [*faults, *found])
        config, more = _validated(rest)
        if config is not None:
            more = also(config)
        more = [fault for fault in more if real(fault)]
        found += more
        if config is not None or not more:
            return found


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
    _check_characters(data, source)
    try:
        return _SPEC.validate_python(data)
    except ValidationError as error:
        raise with_lines(faults_of(error, data, _spec_schema()), source, lines) from None


_search_schema = functools.cache(json_schema)
_spec_schema = functools.cache(_SPEC.json_schema)
