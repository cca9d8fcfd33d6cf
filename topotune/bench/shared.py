"""What the benchmarks share: fair timing, the machine's name, and tables."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from topotune.errors import ConfigError
from topotune.train.process import synchronise

if TYPE_CHECKING:
    from rich.table import Table

Record = TypeVar("Record")
Columns = Mapping[str, Callable[[Record], str]]
"""A table's headings, and what stands below each of a record."""


def device_name(device: torch.device) -> str:
    """The GPU's own name, or the processor's kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many CPU threads of torch inside of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def at_least(place: str, counts: Iterable[tuple[str, int | None, int]]) -> None:
    """Refuse a count below its least value; each is (option, value, least), None is unset.

    Raises:
        ConfigError: one is.
    """
    for option, value, least in counts:
        if value is not None and value < least:
            raise ConfigError(f"{place}: {option}", f"must be >= {least} (got {value})")


def alternate(
    contenders: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each contender in every round, in an order that rotates, after one uncounted run.

    Whatever slows the machine down in a round slows all contenders alike.
    """
    for contender in contenders.values():
        contender()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            synchronise(device)
            begin = time.perf_counter()
            contenders[name]()
            synchronise(device)
            seconds[name].append(time.perf_counter() - begin)
        order = order[1:] + order[:1]
    return seconds


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The median of two values or more, and the distance between the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low


def ratio(times: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Median of the ratios within a round, and the distance between their quartiles."""
    return median_and_spread([a / b for a, b in zip(times, baseline, strict=True)])


def number(value: float | None, shape: str, factor: float = 1.0) -> str:
    """A cell: the value times ``factor``, or a dash for None."""
    return "-" if value is None else shape.format(factor * value)


def table(title: str, columns: Columns[Record], records: Iterable[Record], words: int = 1) -> Table:
    """A line a record; the first ``words`` columns hold words, the others numbers."""
    from rich.table import Table
    from rich.text import Text

    out = Table(title=Text(title), title_justify="left")
    for number, heading in enumerate(columns):
        out.add_column(heading, justify="left" if number < words else "right", no_wrap=True)
    for record in records:
        out.add_row(*(Text(cell(record)) for cell in columns.values()))
    return out
