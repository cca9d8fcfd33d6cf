"""Hostile inputs: seeds of every file that topotune reads from others, and ways to break them."""

from __future__ import annotations

import copy
import json
import math
import random
import zlib
from collections.abc import Sequence
from typing import Any

import yaml

from topotune.config.spaces import shipped_spaces
from topotune.records import EpochReport, Outcome
from topotune.tracking.entries import (
    Artifact,
    End,
    Entry,
    Epoch,
    Metrics,
    Series,
    Start,
    Tags,
    to_payload,
)

_TOKENS = (
    *(b"&a ", b"*a", b"<<: *a", b"!!python/object/apply:os.system ['true']", b"!!binary |", b"? "),
    *(b"---\n", b"...\n", b"%YAML 9.9\n", b"| ", b"> ", b"'", b'"', b"#", b"- ", b": ", b"\t"),
    *(
        b"[" * 200,
        b"[" * 20_000,
        b'{"a":' * 20_000,
        b"{a: " * 100,
        b"- " * 100,
        b"? " * 60,
        b"9" * 300,
        b"0x" + b"f" * 300,
    ),
    *(b"1e999", b"-1e999", b".nan", b"-.inf", b"0o9", b"1_000", b"null", b"NaN", b"Infinity"),
    *(b"\x00", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xe2\x80\xae", b"\x1b[31m", b"\r", b"\n"),
    *(b'"\\uD800"', b'"\\x00"', b"../../x", b"/etc/passwd", b"a" * 5000, b"1" + b"0" * 400),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 10**30, -(10**30), 2**63, 2**64, 10**320, 1e308, 5e-324),
    *(math.nan, math.inf, -math.inf, "", " ", "nan", "inf", "-1", "1e400", "..", "../x", "/x"),
    *("a" * 1000, "\x1b[2J", "\u202e", "\x00", "\ud800", "'; DROP TABLE runs; --", "x:y", "model."),
    *([], {}, [[]], [None], {"a": {}}, {"": None}, ["a"] * 50, {"type": "float"}, [0.1, 0.2]),
    *({"type": "int", "low": 1, "high": 10**400}, {"type": "categorical", "choices": [[], {}]}),
)


def space_files() -> list[bytes]:
    """The search files that come with topotune, whether it is installed or checked out."""
    return [path.read_bytes() for path in shipped_spaces().values()]


def records() -> list[dict[str, Any]]:
    """The records that an outbox holds, one of each kind, as JSON objects."""
    at = 1_700_000_000_000
    bodies = (
        Start({"lr": "0.1", "coupling": "uniform"}, {"device": "cpu"}, at),
        Metrics({"overhead_vs_adam": 1.1, "bad": math.nan}, 0, at),
        Epoch(EpochReport(1, 10, {"loss": 0.5, "val_accuracy": math.inf}, 0.1, at)),
        Series({"loss": [(1, 0.5), (10, math.inf)], "energy": []}, at),
        Tags({"topotune.method": "adam"}, at),
        Artifact("trials/0000/trace.npz", "", "00ff", at),
        End(Outcome.PRUNED.value, "asha", at),
    )
    return [to_payload(Entry(0, body)) for body in bodies]


def study_records() -> list[dict[str, Any]]:
    """The records of a study, one of each kind that a search writes."""
    by = {"worker_id": "w"}
    lr = '{"name": "FloatDistribution", "attributes": {"low": 0.1, "high": 1.0}}'
    start, end = "2026-01-01T00:00:00+00:00", "2026-01-01T00:01:00+00:00"
    spec = {"task": "digits", "method": "adam", "epochs": 2, "seed": 1}
    ended = {
        "outcome": "COMPLETE",
        "reason": "",
        "metrics": {"val_accuracy": 0.9, "bad": "nan"},
        "epochs": 2,
        "device_seconds": 1.5,
    }
    spent = {"topotune:spent": {"wall_seconds": 3.5, "trials": {"0": 1.5}}}
    trial = {"trial_id": 0, **by}
    param = {"param_name": "lr", "param_value_internal": 0.2, "distribution": lr}
    return [
        {"op_code": 0, **by, "study_name": "fuzz", "directions": [2]},
        {"op_code": 3, **by, "study_id": 0, "system_attr": {"study:metric_names": ["acc"]}},
        {"op_code": 4, **by, "study_id": 0, "datetime_start": start},
        {"op_code": 9, **trial, "system_attr": {"fixed_params": {"lr": 0.2}}},
        {"op_code": 5, **trial, **param},
        {"op_code": 8, **trial, "user_attr": {"spec": spec}},
        {"op_code": 8, **trial, "user_attr": {"deaths": {"crash": 1}}},
        {"op_code": 7, **trial, "step": 1, "intermediate_value": 0.5},
        {"op_code": 3, **by, "study_id": 0, "system_attr": spent},
        {"op_code": 8, **trial, "user_attr": {"end": ended}},
        {"op_code": 9, **trial, "system_attr": {"constraints:finished": -1.0}},
        {"op_code": 6, **trial, "state": 1, "values": [0.9], "datetime_complete": end},
    ]


def journal(payloads: Sequence[Any]) -> bytes:
    """Anything as lines of a study whose checksums hold."""
    crc, lines = 0, []
    for payload in payloads:
        body = json.dumps(payload, separators=(",", ":")).encode()[:-1]
        crc = zlib.crc32(body, crc)
        lines.append(b'%b,"crc":"%08x"}\n' % (body, crc))
    return b"".join(lines)


def checked_lines(payloads: Sequence[Any]) -> bytes:
    """Anything as lines whose length and checksum hold."""
    bodies = [json.dumps(payload, separators=(",", ":")).encode() for payload in payloads]
    return b"".join(b"%08x %08x %b\n" % (zlib.crc32(body), len(body), body) for body in bodies)


class Mutator:
    """Breaks inputs in random ways that repeat for a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def damage(self, data: bytes, other: bytes) -> bytes:
        """A few byte-level changes; ``other`` is spliced in at times."""
        for _ in range(self.random.choice((1, 1, 1, 2, 3, 8))):
            data = self._once(data, other)
        return data

    def _once(self, data: bytes, other: bytes) -> bytes:
        r = self.random
        at = r.randint(0, len(data))
        end = min(len(data), at + r.choice((1, 2, 8, 60, 400)))
        match r.randrange(8):
            case 0 if data:
                flipped = data[at - 1] ^ (1 << r.randrange(8))
                return data[: at - 1] + bytes([flipped]) + data[at:] if at else data
            case 1:
                return data[:at] + data[end:]
            case 2:
                return data[:at] + data[at:end] * r.randint(2, 5) + data[end:]
            case 3:
                return data[:at]
            case 4:
                cut = r.randint(0, len(other))
                return data[:at] + other[cut : cut + 400] + data[end:]
            case 5:
                lines = data.splitlines(keepends=True)
                r.shuffle(lines)
                return b"".join(lines)
            case 6:  # another value behind a key
                lines = data.split(b"\n")
                i = r.randrange(len(lines))
                key, colon, _ = lines[i].partition(b": ")
                lines[i] = key + (colon or b": ") + r.choice(_TOKENS)
                return b"\n".join(lines)
            case _:
                return data[:at] + r.choice(_TOKENS) + data[at:]

    def reshape(self, data: Any) -> Any:
        """Plain data of the same kind with some values, keys or items replaced, moved or gone."""
        whole = [copy.deepcopy(data)]
        for _ in range(self.random.choice((1, 1, 2, 4))):
            self._reshape_once(whole)
        return whole[0]

    def _reshape_once(self, root: list[Any]) -> None:
        r = self.random
        holder: Any = root
        key: Any = 0
        while isinstance(inner := holder[key], dict | list) and inner and r.random() < 0.85:
            holder = inner
            key = r.choice(list(inner)) if isinstance(inner, dict) else r.randrange(len(inner))
        value = copy.deepcopy(r.choice(_VALUES))
        match r.randrange(5):
            case 0 if isinstance(holder, dict):
                holder[str(r.choice(_VALUES))[:50]] = holder.pop(key)
            case 1 if holder is not root:
                del holder[key]
            case 2 if isinstance(holder, dict):
                holder[r.choice(("extra", "lr", "name", *map(str, holder)))] = value
            case _:
                holder[key] = value

    def yaml_text(self, data: Any) -> bytes:
        """Plain data as YAML; numbers and quotes in PyYAML's own style."""
        return yaml.safe_dump(data, sort_keys=False).encode("utf-8", "surrogatepass")

    def json_text(self, data: Any) -> bytes:
        """Plain data as JSON, the words NaN and Infinity included."""
        return json.dumps(data).encode()
