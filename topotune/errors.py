"""Every error that topotune raises on purpose.

The tree::

    TopotuneError                  caught once, at the command line
    +-- UserError                  the input or the environment must change: exit code 2
    |   +-- ConfigError            a search file, config or option; names place, value, rule, fix
    |   |   +-- FieldError         the same of a search file, by the path of its key
    |   |   +-- FaultsError        several of these: all faults of a file at once
    |   |   +-- UnstableError      values whose dynamics cannot settle, however well they are solved
    |   +-- UnknownNameError       a name that no registry knows; lists the known and the nearest
    |   +-- PluginError            "package.module:Name" does not load or has the wrong type
    |   +-- DataUnavailableError   a data set is neither on disk nor downloadable
    |   +-- ResourceError          more devices than there are, or a folder that cannot be written
    |   +-- SearchFolderError      a results folder that is missing, foreign or in use
    +-- InterruptError             a signal ended the command: exit code 130
    +-- RunError                   the input was fine, the run was not: exit code 1
        +-- CheckpointError        a checkpoint is unreadable or belongs to another trial
        +-- DivergedError          training left the finite numbers or its energy bound
        +-- GpuMemoryError         a GPU's memory was full; the trial is tried once more
        +-- StoppedError           training goes on but cannot learn; the trial ends as pruned
        +-- LeaseLostError         another driver took the search over; nothing more is written
        +-- OutboxError            the outbox cannot be written
        +-- TrackingError          the tracking server refused what it was sent
        +-- VerificationError      an exported config did not reproduce its recorded metric

A message names the place, the value, the rule and the fix, in that order.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any


class TopotuneError(Exception):
    """Base of all deliberate errors; its text is shown to the user as it is."""

    exit_code = 1


class UserError(TopotuneError):
    """The input or the environment must change before a retry can succeed."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration value breaks a rule.

    Args:
        place: where the value stands, such as ``space.yaml:12: space.lr``.
        problem: the rule that is broken, with the value that breaks it.
        fix: what to write instead; may be empty.
    """

    def __init__(self, place: str, problem: str, fix: str = "") -> None:
        self.place, self.problem, self.fix = place, problem, fix
        super().__init__(f"{place}: {problem}" + (f". {fix}" if fix else ""))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[Any, ...]]:
        return type(self), (self.place, self.problem, self.fix)


class FieldError(ConfigError):
    """A value of a search file breaks a rule that its reader cannot know; it adds file and line.

    Args:
        path: the keys that lead to the value, such as ``("space", "lr")``.
        problem, fix: as of :class:`ConfigError`.
    """

    def __init__(self, path: tuple[str | int, ...], problem: str, fix: str = "") -> None:
        self.path = path
        super().__init__(dotted(path), problem, fix)

    def __reduce__(self) -> tuple[type[FieldError], tuple[Any, ...]]:
        return type(self), (self.path, self.problem, self.fix)


class FaultsError(ConfigError):
    """Several faults; the text has a line for each, place, problem and fix are the first one's."""

    SHOWN = 20

    def __init__(self, faults: Sequence[ConfigError]) -> None:
        self.faults = tuple(faults)
        first = faults[0]
        super().__init__(first.place, first.problem, first.fix)
        self.args = ("\n".join(self.texts()),)

    def texts(self) -> list[str]:
        """A line for each fault, of very many for the first ones."""
        more = len(self.faults) - self.SHOWN
        last = [f"{more} more faults; the first {self.SHOWN} are shown"] if more > 0 else []
        return [str(fault) for fault in self.faults[: self.SHOWN]] + last

    def __reduce__(self) -> tuple[type[FaultsError], tuple[Any, ...]]:
        return type(self), (self.faults,)


def combined(faults: Iterable[ConfigError]) -> ConfigError:
    """The one fault, or a FaultsError with all; there is at least one."""
    found = list(faults)
    return found[0] if len(found) == 1 else FaultsError(found)


def dotted(path: tuple[str | int, ...]) -> str:
    """The path of a key in a file as text, such as ``warm_start[0].lr``."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else (f".{key}" if text else key)
    return text


class UnstableError(ConfigError):
    """Values that are legal one by one and together make dynamics that never settle.

    A search refuses them where it can see them; a trial that samples them ends as DIVERGED.
    """


class UnknownNameError(UserError):
    """A name is not in the registry that it was looked up in."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.known, self.hint = kind, name, tuple(known), hint
        super().__init__(f"unknown {kind} {name!r}" + did_you_mean(name, self.known, hint))

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, tuple[str, ...], str]]:
        return type(self), (self.kind, self.name, self.known, self.hint)


class PluginError(UserError):
    """An import path does not lead to an object of the expected kind."""


class DataUnavailableError(UserError):
    """A data set is not on disk and cannot be downloaded."""


class ResourceError(UserError):
    """The machine does not have what the configuration asks for."""


class SearchFolderError(UserError):
    """A results folder is missing, belongs to another search, or is in use."""


class InterruptError(TopotuneError):
    """A signal ended a command.

    Args:
        cause: what the signal raised; its text is the signal's name, or a sentence.
        rest: what is kept and what to type next; may be empty.
    """

    exit_code = 130

    def __init__(self, cause: KeyboardInterrupt, rest: str = "") -> None:
        text = str(cause) or "SIGINT"
        super().__init__((text if " " in text else f"stopped by {text}") + rest)


class RunError(TopotuneError):
    """The input was accepted and the run failed."""


class CheckpointError(RunError):
    """A checkpoint is unreadable, damaged, or belongs to another trial."""


class DivergedError(RunError):
    """Training produced a non-finite number or left its energy bound; the text is the cause."""


class GpuMemoryError(RunError):
    """A trial's GPU had no memory left; the text says what it took and what there is."""


class StoppedError(RunError):
    """Training goes on without learning, such as on states that never converge; the text says why.

    The trial ends as PRUNED with this reason.
    """


class LeaseLostError(RunError):
    """Another driver took the search over while this process was suspended or cut off."""


class OutboxError(RunError):
    """The outbox, the write-ahead log of all that MLflow gets, cannot be written."""


class TrackingError(RunError):
    """The tracking server answered and refused the data."""


class VerificationError(RunError):
    """A second training of an exported config did not give the recorded metric."""


_ALSO_CALLED = {
    **dict.fromkeys(("learning_rate", "step_size"), "lr"),
    "epsilon": "eps",
    "l2": "weight_decay",
    **dict.fromkeys(("bayes", "bayesian", "bayesopt", "bo", "hyperopt"), "tpe"),
    **dict.fromkeys(("sobol", "halton"), "qmc"),
    **dict.fromkeys(("genetic", "evolution"), "nsga2"),
    **dict.fromkeys(("off", "no"), "none"),
    **dict.fromkeys(("accuracy", "acc", "val_acc"), "val_accuracy"),
    "loss": "val_loss",
    **dict.fromkeys(("num_samples", "n_trials"), "trials"),
    "timeout": "wall_clock",
    **dict.fromkeys(("min", "lower"), "low"),
    **dict.fromkeys(("max", "upper"), "high"),
    "values": "choices",
    "dataset": "task",
    "optimizer": "method",
    **dict.fromkeys(("parameters", "params"), "space"),
}
"""What other libraries call a thing to its name here, where spelling does not lead to it."""


def did_you_mean(name: str, known: Iterable[str], hint: str = "") -> str:
    """The tail of a message about an unknown name: the nearest known one, then all of them."""
    options = sorted(known)
    near = nearest(name, options)
    text = f"; did you mean {near!r}?" if near else ""
    text += f" (known: {', '.join(options)})" if options else ""
    return text + (f" {hint}" if hint else "")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant."""
    options = list(known)
    if (other := _ALSO_CALLED.get(name.lower())) in options:
        return other
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return near[0] if near else None


_OURS = str(PurePath(__file__).parent)
_LIBRARY = re.compile(r"/(?:(?:site|dist)-packages|lib/python3[^/]*)/|^<")


def in_one_line(error: BaseException) -> str:
    """An exception of code that is not ours: its kind, the first line of its text (a
    library in C++ adds its whole stack) and the place in a user's code that it came from."""
    try:
        lines = str(error).strip().splitlines()
    except Exception as failed:  # noqa: BLE001 - a user's own class may fail when it is asked
        lines = [f"its text raises {type(failed).__name__}"]
    text = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _LIBRARY.search(frame.filename) and not frame.filename.startswith(_OURS):
            return f"{text} (at {PurePath(frame.filename).name}:{frame.lineno})"
    return text
