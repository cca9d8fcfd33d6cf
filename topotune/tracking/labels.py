"""What every run of a search says of it, so that an experiment of many searches can be filtered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from topotune.tracking.entries import Start
from topotune.tracking.naming import clean_text
from topotune.tracking.outbox import read_all

SEARCH, METHOD, TASK = "topotune.search", "topotune.method", "topotune.task"
MODEL, USER, VERSION = "topotune.model", "topotune.user", "topotune.version"
_SHARED = (SEARCH, METHOD, TASK, MODEL, USER)
"""Tags of the search that its trials carry from their first moment on; a trial's own record tells
the version that ran it."""


@dataclass(frozen=True)
class Labels:
    """A search in the words of its own first record.

    Attributes:
        tags: tags for each of its runs.
        metrics: its objectives' metrics, the first one first.
        maximize: whether the highest value of the first is the best.
        searched: the parameters that it varies.
        began: when it began, in Unix milliseconds; 0 where that is not known.
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    maximize: bool = True
    searched: tuple[str, ...] = ()
    began: int = 0

    @classmethod
    def read(cls, folder: Path) -> Labels:
        """Those of a search's folder; empty ones where it has no record of its own yet.

        Raises:
            OutboxError: the outbox cannot be read.
        """
        for _, entry in read_all(folder):
            if entry.trial is None and isinstance(entry.body, Start):
                return cls.of(entry.body)
        return cls()

    @classmethod
    def of(cls, start: Start) -> Labels:
        """Those that the beginning of a search tells."""
        tags = {name: start.tags[name] for name in _SHARED if name in start.tags}
        method, task = tags.get(METHOD, ""), tags.get(TASK, "")
        if method and task:
            tags["mlflow.source.name"] = f"{short(method)} on {short(task)} (topotune)"
        if USER in tags:
            tags["mlflow.user"] = tags[USER]
        goals = [goal.partition(" ") for goal in _words(start.params.get("objective", ""))]
        return cls(
            tags=tags,
            metrics=tuple(metric for _, _, metric in goals),
            maximize=not goals or goals[0][0] == "maximize",
            searched=_words(start.params.get("searched", "")),
            began=start.at,
        )


def short(name: str) -> str:
    """A method or task without the path of its module."""
    return clean_text(name.rpartition(":")[2], 40)


def trial_name(number: int, outcome: str, figures: str = "") -> str:
    """A trial's run's name, such as ``14 · 0.9459 · complete``: a narrow column cuts its end, so
    it begins with what differs between the runs of a search.

    Args:
        number: the trial's number.
        outcome: how it ended, or RUNNING.
        figures: its objectives' values as text; empty where there are none.
    """
    return " · ".join(part for part in (str(number), figures, outcome.lower()) if part)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(", ") if word)
