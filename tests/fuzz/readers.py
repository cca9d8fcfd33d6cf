"""Throws broken files at every reader of files that come from others; only our errors may come out.

Mutations of real files, by bytes and by structure: search files, exported configs, outboxes
and the small files of a results folder. A finding repeats by its seed and its number.
"""

from __future__ import annotations

import json
import resource
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.fuzz.inputs import (
    Mutator,
    checked_lines,
    journal,
    records,
    space_files,
    study_records,
)
from topotune.config.file import load_spec, parse_search, parse_yaml
from topotune.errors import TopotuneError
from topotune.records import TrialSpec
from topotune.results.yamltext import dump_yaml
from topotune.search.place.folder import LAYOUT, STUDY_FILE, SearchFolder
from topotune.search.study.rows import read_study
from topotune.tracking.entries import Tags, items
from topotune.tracking.outbox import OUTBOX_FILE, Outbox, read_all
from topotune.tracking.progress import Progress, Refused

SLOW = 5.0
"""CPU seconds that no input may take."""


@dataclass(frozen=True)
class Failure:
    """An input that raised something else than our errors: what was raised, and the input."""

    error: str
    data: bytes


@dataclass
class FuzzRecord:
    """What one reader was given.

    Attributes:
        target: the reader.
        inputs: how many inputs.
        refused: how many it refused with an error of ours; it took the others.
        seconds: CPU seconds for all of them.
        slowest: CPU seconds of the slowest.
        grown_mb: growth of the process's peak memory meanwhile, megabytes.
        failures: one input a distinct failure.
    """

    target: str
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    grown_mb: float = 0.0
    failures: list[Failure] = field(default_factory=list)


def table(records: Sequence[FuzzRecord]) -> Table:
    """What all readers were given."""
    out = Table(title="Broken inputs, by what reads them", title_justify="left")
    for heading in (
        *("reader", "inputs", "refused with our errors", "failures", "inputs a CPU second"),
        *("slowest, CPU s", "memory grown, MB"),
    ):
        out.add_column(heading, justify="left" if heading == "reader" else "right")
    for one in records:
        out.add_row(
            *(one.target, str(one.inputs), str(one.refused), str(len(one.failures))),
            f"{one.inputs / one.seconds:.0f}" if one.seconds else "",
            *(f"{one.slowest:.2f}", f"{one.grown_mb:.0f}"),
        )
    return out


def read_search(data: bytes, _folder: Path) -> None:
    """The search-file parser, and whether what it took survives the results folder."""
    config = parse_search(*_named(data))
    again = json.loads(json.dumps(config.model_dump(mode="json")))
    parse_search(again, "search.json", {})


def read_spec(data: bytes, folder: Path) -> None:
    """The reader of ``topotune train``, and the round trip of what it took."""
    path = folder / "config.yaml"
    path.write_bytes(data)
    TrialSpec.from_json(load_spec(path).to_json())


def read_outbox(data: bytes, folder: Path) -> None:
    """Shipper and driver read an outbox; a record that is appended then must be found again."""
    (folder / OUTBOX_FILE).write_bytes(data)
    for _, entry in read_all(folder):
        list(items(entry))
    last = Tags({"appended": uuid.uuid4().hex}, 1)
    Outbox(folder).put(0, last)
    found = [entry.body for _, entry in read_all(folder)]
    if not found or found[-1] != last:
        raise AssertionError("the record that was appended is not read")


def read_journal(data: bytes, folder: Path) -> None:
    """A study, whose records may be anything that JSON can say."""
    home = SearchFolder(folder / "journal")
    home.root.mkdir(exist_ok=True)
    (home.root / STUDY_FILE).write_bytes(data)
    config = parse_search({**_plain(space_files()[0]), "name": "fuzz"}, "seed", {})
    for row in read_study(home, config)[0]:
        row.to_json()


def read_small_files(data: bytes, folder: Path) -> None:
    """Identity and the shipper's files of a results folder."""
    root = folder / "demo"
    root.mkdir(exist_ok=True)
    for name in ("search.json", "shipped.json", "refused.jsonl"):
        (root / name).write_bytes(data)
    len(Refused(root))
    progress = Progress(root, "store")
    progress.save()
    SearchFolder.open(folder, "demo").config()


def _named(data: bytes) -> tuple[Any, str, Any]:
    value, lines = parse_yaml(data, "fuzz.yaml")
    return value, "fuzz.yaml", lines


TARGETS: Mapping[str, tuple[Callable[[bytes, Path], None], float]] = {
    "search file": (read_search, 0.35),
    "exported config": (read_spec, 0.15),
    "outbox": (read_outbox, 0.25),
    "study": (read_journal, 0.05),
    "results folder": (read_small_files, 0.2),
}
"""Reader and its share of the inputs."""


def run(inputs: int, seed: int, folder: Path) -> list[FuzzRecord]:
    """Fuzz all readers.

    Args:
        inputs: in all.
        seed: of the mutations.
        folder: for the files.
    """
    return [
        _fuzz(target, round(share * inputs), seed, folder) for target, (_, share) in TARGETS.items()
    ]


def try_one(target: str, data: bytes, folder: Path) -> bool:
    """Give one input to a reader; whether it was taken and not refused.

    Raises:
        Exception: whatever came out that is no error of ours.
    """
    try:
        TARGETS[target][0](data, folder)
    except TopotuneError:
        return False
    return True


def _fuzz(target: str, inputs: int, seed: int, folder: Path) -> FuzzRecord:
    mutator, record = Mutator(seed), FuzzRecord(target)
    make = _maker(target, mutator)
    seen: set[str] = set()
    peak = _peak_mb()
    for _ in range(inputs):
        data = make()
        began = time.thread_time()
        error = ""
        try:
            record.refused += not try_one(target, data, folder)
        except Exception as caught:  # noqa: BLE001 - this is what is looked for
            place = traceback.extract_tb(caught.__traceback__)[-1]
            error = f"{type(caught).__name__} at {Path(place.filename).name}:{place.lineno}"
            text = f"{error}: {str(caught)[:200]}"
        seconds = time.thread_time() - began
        if seconds > SLOW:
            error = text = f"took more than {SLOW:g} s"
        if error and error not in seen:
            seen.add(error)
            record.failures.append(Failure(text, data))
        record.inputs += 1
        record.seconds += seconds
        record.slowest = max(record.slowest, seconds)
    record.grown_mb = _peak_mb() - peak
    return record


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _maker(target: str, mutator: Mutator) -> Callable[[], bytes]:
    """Makes the next input of a target: a seed broken by bytes, or by structure."""
    pick = mutator.random.choice
    if target in ("outbox", "study"):
        payloads, lines = records(), checked_lines
        if target == "study":
            payloads, lines = study_records(), journal
        plain = lines(payloads)

        def make_lines() -> bytes:
            if mutator.random.random() < 0.4:
                return mutator.damage(plain, plain)
            return lines([mutator.reshape(payload) for payload in payloads])

        return make_lines
    seeds: list[tuple[bytes, Any]]
    encode = mutator.yaml_text
    if target == "search file":
        seeds = [(raw, _plain(raw)) for raw in space_files()]
    elif target == "exported config":
        specs = [TrialSpec("digits", "adam", 3, 1, {"lr": 0.1, "betas": [0.9, 0.99]}).to_dict()]
        seeds = [(dump_yaml(spec).encode(), spec) for spec in specs]
    else:
        encode = mutator.json_text
        seeds = [(encode(data), data) for data in _small_files()]

    def make() -> bytes:
        raw, data = pick(seeds)
        if mutator.random.random() < 0.5:
            return mutator.damage(raw, pick(seeds)[0])
        return encode(mutator.reshape(data))

    return make


def _plain(raw: bytes) -> Any:
    return parse_yaml(raw, "seed")[0]


def _small_files() -> list[Any]:
    config = parse_search(_plain(space_files()[0]), "seed", {}).model_dump(mode="json")
    return [
        {"layout": LAYOUT, "search_id": "0" * 32, "config": config},
        {
            "store": "store",
            "offset": 100,
            "crc": 12345,
            "runs": {"search": "a" * 32, "0": "b" * 32},
            "ended": {"0": 1_700_000_000_000},
        },
        {"offset": 5, "kind": "metric", "key": "a", "reason": "x"},
    ]
