"""What is recorded for MLflow: typed records, and the metric points, parameters and tags they
stand for. Workers send them to the driver, and the outbox holds them.

Reading is strict: an outbox may come from another machine or from other people, so every field is
checked and a record that breaks a rule raises OutboxError, never anything else.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeAlias

from topotune.errors import OutboxError
from topotune.records import (
    EpochReport,
    Outcome,
    Value,
    pack_metrics,
    pack_number,
    unpack_number,
)
from topotune.redaction import redact
from topotune.tracking.naming import MAX_TAG, clean_name, clean_tag, clean_text

OUTCOME_TAG = "topotune.outcome"
RUNNING = "RUNNING"
"""The outcome tag's value from a run's beginning to its end."""
INTERRUPTED = "INTERRUPTED"
"""Outcome of a search that was stopped and can be resumed; trials end with an Outcome."""

OUTCOMES = (*(o.value for o in Outcome), INTERRUPTED)
STEP_PREFIX = "step/"
"""Begins the names of curves over optimizer steps; others have epochs as their steps."""
_INT64 = 2**63
_MAX_PARAM = 6000


@dataclass(frozen=True)
class Start:
    """A run begins, or begins again. Parameters are text already."""

    params: Mapping[str, str]
    tags: Mapping[str, str]
    at: int


@dataclass(frozen=True)
class Epoch:
    """An epoch is finished."""

    report: EpochReport

    @property
    def at(self) -> int:
        """When, by the worker's clock."""
        return self.report.timestamp_ms


@dataclass(frozen=True)
class Metrics:
    """Values that belong to no epoch."""

    values: Mapping[str, float]
    step: int
    at: int


@dataclass(frozen=True)
class Series:
    """Curves over optimizer steps: of each name its (step, value) points, steps ascending."""

    points: Mapping[str, Sequence[tuple[int, float]]]
    at: int

    @property
    def last(self) -> int:
        """The last step of all; 0 without any."""
        return max((points[-1][0] for points in self.points.values() if points), default=0)


@dataclass(frozen=True)
class Tags:
    """Tags that replace those of the same name."""

    tags: Mapping[str, str]
    at: int


@dataclass(frozen=True)
class Artifact:
    """A finished file, by its path relative to the search folder; ``digest`` is its content's."""

    path: str
    folder: str
    digest: str
    at: int


@dataclass(frozen=True)
class End:
    """How a run ended."""

    outcome: str
    reason: str
    at: int


Body: TypeAlias = Start | Epoch | Metrics | Series | Tags | Artifact | End


@dataclass(frozen=True)
class Entry:
    """One record of the outbox: what happened to which trial (None: to the search itself)."""

    trial: int | None
    body: Body

    @property
    def at(self) -> int:
        """When it happened, Unix milliseconds."""
        return self.body.at


@dataclass(frozen=True)
class Item:
    """The smallest thing a store takes.

    Attributes:
        kind: "metric", "param" or "tag".
        key: its name, in the characters that MLflow allows.
        value: a float for a metric, text otherwise.
        step, at: a metric's step and Unix milliseconds; 0 otherwise.
    """

    kind: str
    key: str
    value: float | str
    step: int = 0
    at: int = 0


def begun(params: Mapping[str, Value], tags: Mapping[str, str], at: int) -> Start:
    """The beginning of a run, its texts clean and without secrets."""
    texts = {name: clean_text(str(value), _MAX_PARAM) for name, value in params.items()}
    texts |= {name: redact(text) for name, text in texts.items() if isinstance(params[name], str)}
    return Start(texts, {**safe_tags(tags), OUTCOME_TAG: RUNNING}, at)


def safe_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags in the length that MLflow takes, without secrets."""
    return {name: clean_tag(redact(str(text)[: 4 * MAX_TAG])) for name, text in tags.items()}


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


def items(entry: Entry) -> Iterator[Item]:
    """The metric points, parameters and tags that a record stands for.

    An epoch's metrics have the epoch number as their step, so that trials of different batch
    sizes line up; the optimizer step is the metric ``optimizer_step`` and the wall time
    ``epoch_seconds``. MLflow keeps NaN but turns an infinity into +-1.8e308 without a word,
    so an infinite ``loss`` becomes the point ``loss_nonfinite``, 1 or -1, at the same step.
    """
    match entry.body:
        case Start(params, tags):
            for key, text in params.items():
                yield Item("param", clean_name(key), clean_text(text, _MAX_PARAM))
            yield from _tag_items(tags)
        case Tags(tags):
            yield from _tag_items(tags)
        case Epoch(report):
            values = {
                "optimizer_step": float(report.step),
                "epoch_seconds": report.seconds,
                **report.metrics,
            }
            yield from _points(values, report.epoch, report.timestamp_ms)
        case Metrics(values, step, at):
            yield from _points(values, step, at)
        case Series(points, at):
            for name, curve in points.items():
                for step, value in curve:
                    yield from _points({f"{STEP_PREFIX}{name}": value}, step, at)
        case Artifact():
            pass
        case End(outcome, reason):
            yield from _tag_items({OUTCOME_TAG: outcome, "topotune.reason": reason})


def size(entry: Entry) -> int:
    """How much a record counts: its items, and one for an artifact or an end."""
    match entry.body:
        case Start(params, tags):
            return len(params) + len(tags)
        case Tags(tags):
            return len(tags)
        case Epoch(report):
            own = {"optimizer_step", "epoch_seconds"}
            return len(own | report.metrics.keys())
        case Metrics(values):
            return len(values)
        case Series(points):
            return sum(map(len, points.values()))
        case Artifact():
            return 1
        case End():
            return 3


def _tag_items(tags: Mapping[str, str]) -> Iterator[Item]:
    for key, text in tags.items():
        yield Item("tag", clean_name(key), clean_tag(text))


def _points(values: Mapping[str, float], step: int, at: int) -> Iterator[Item]:
    for name, value in values.items():
        if math.isinf(value):
            sign = math.copysign(1.0, value)
            yield Item("metric", clean_name(f"{name}_nonfinite"), sign, step, at)
        else:
            yield Item("metric", clean_name(name), value, step, at)


def to_payload(entry: Entry) -> dict[str, Any]:
    """A record as a line's JSON object."""
    body = entry.body
    payload: dict[str, Any] = {"kind": type(body).__name__.lower(), "trial": entry.trial}
    if isinstance(body, Epoch):
        return payload | {"report": body.report.to_dict()}
    payload |= vars(body)
    if isinstance(body, Metrics):
        payload["values"] = pack_metrics(body.values)
    if isinstance(body, Series):
        payload["points"] = {
            name: [(step, pack_number(value)) for step, value in curve]
            for name, curve in body.points.items()
        }
    return payload


def from_payload(payload: Mapping[str, Any]) -> Entry:
    """The inverse of :func:`to_payload`.

    Raises:
        OutboxError: a field is missing or breaks its rule.
    """
    kind = payload.get("kind")
    trial = None if payload.get("trial") is None else _int(payload, "trial")
    body: Body
    match kind:
        case "start":
            body = Start(_texts(payload, "params"), _texts(payload, "tags"), _int(payload, "at"))
        case "epoch":
            body = Epoch(_report(payload.get("report")))
        case "metrics":
            at = _int(payload, "at")
            body = Metrics(_numbers(payload, "values"), _int(payload, "step"), at)
        case "series":
            body = Series(_curves(payload), _int(payload, "at"))
        case "tags":
            body = Tags(_texts(payload, "tags"), _int(payload, "at"))
        case "artifact":
            path, folder = _inside(payload, "path"), _inside(payload, "folder", empty=True)
            body = Artifact(path, folder, _text(payload, "digest"), _int(payload, "at"))
        case "end":
            outcome = _text(payload, "outcome")
            if outcome not in OUTCOMES:
                raise OutboxError(
                    f"outcome: expected one of {', '.join(OUTCOMES)}, got {outcome!r}"
                )
            body = End(outcome, _text(payload, "reason"), _int(payload, "at"))
        case _:
            raise OutboxError(f"kind: {kind!r} is unknown")
    return Entry(trial, body)


def _int(data: Mapping[str, Any], name: str) -> int:
    value = data.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _INT64:
        raise OutboxError(f"{name}: expected an integer from 0 to 2^63, got {value!r:.80}")
    return value


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        raise OutboxError(f"{name}: expected text, got {value!r:.80}")
    return value


def _texts(data: Mapping[str, Any], name: str) -> dict[str, str]:
    value = data.get(name)
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise OutboxError(f"{name}: expected an object of texts, got {value!r:.80}")
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise OutboxError(f"{name}: expected a number, got {value!r:.80}")
    try:
        return unpack_number(value)
    except (KeyError, OverflowError):
        raise OutboxError(f"{name}: expected a number, got {value!r:.80}") from None


def _numbers(data: Mapping[str, Any], name: str) -> dict[str, float]:
    value = data.get(name)
    if not isinstance(value, dict):
        raise OutboxError(f"{name}: expected an object of numbers, got {value!r:.80}")
    return {key: _number(number, f"{name}.{key:.80}") for key, number in value.items()}


def _curves(data: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    value = data.get("points")
    try:
        if not isinstance(value, dict):
            raise ValueError
        found = {name: [_point(*pair) for pair in curve] for name, curve in value.items()}
    except (TypeError, ValueError):
        raise OutboxError(f"points: expected an object of points, got {value!r:.80}") from None
    return found


def _point(step: object, value: object) -> tuple[int, float]:
    return _int({"step": step}, "step"), _number(value, "value")


def _report(value: object) -> EpochReport:
    if not isinstance(value, dict):
        raise OutboxError(f"report: expected an object, got {value!r:.80}")
    return EpochReport(
        epoch=_int(value, "epoch"),
        step=_int(value, "step"),
        metrics=_numbers(value, "metrics"),
        seconds=_number(value.get("seconds"), "seconds"),
        timestamp_ms=_int(value, "timestamp_ms"),
    )


def _inside(data: Mapping[str, Any], name: str, empty: bool = False) -> str:
    """A relative path with forward slashes that does not climb."""
    text = _text(data, name)
    path = PurePosixPath(text)
    bad = path.is_absolute() or ".." in path.parts or re.search(r"[\x00-\x1f\\]", text)
    if bad or not (text or empty):
        raise OutboxError(f"{name}: {text!r:.80} is not a path inside the search folder")
    return text
