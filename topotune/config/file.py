"""Read search files and training configs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from topotune.config.faults import faults_of, sound_part, with_lines
from topotune.config.models import SAVED, SearchConfig, json_schema
from topotune.config.yamlfile import HALF, Lines, parse_yaml, read_yaml
from topotune.errors import ConfigError, FieldError
from topotune.records import OverheadOptions, TrainOptions, TrialSpec

__all__ = ["load_search", "load_spec", "parse_search", "parse_spec", "parse_yaml", "read_yaml"]


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
        saved: it is of a search that exists, where a secret is no longer refused.
        also: finds what is wrong beyond the file's own rules; asked about the sound part of a file
            that has faults, so that all are seen at once.
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
        faults = faults_of(error, data, _search_schema())
        with contextlib.suppress(UnicodeEncodeError):
            faults += _further(data, faults, also)
        raise with_lines(faults, source, lines) from None
    except UnicodeEncodeError:  # of a rule's message; YAML has named the line before
        raise ConfigError(source, HALF) from None


def _further(
    data: dict[str, Any],
    faults: list[FieldError],
    also: Callable[[SearchConfig], list[FieldError]],
) -> list[FieldError]:
    """Faults of the part of a file that has none of these."""
    found: list[FieldError] = []
    while True:
        rest, real = sound_part(data, [*faults, *found])
        try:
            more = also(SearchConfig.model_validate(rest))
            last = True
        except ValidationError as error:
            more, last = faults_of(error, rest, _search_schema()), False
        more = [fault for fault in more if real(fault)]
        found += more
        if last or not more:
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
    try:
        return _SPEC.validate_python(data)
    except ValidationError as error:
        raise with_lines(faults_of(error, data, _spec_schema()), source, lines) from None
    except UnicodeEncodeError:
        raise ConfigError(source, HALF) from None


@functools.cache
def _search_schema() -> dict[str, Any]:
    return json_schema()


@functools.cache
def _spec_schema() -> dict[str, Any]:
    return _SPEC.json_schema()
