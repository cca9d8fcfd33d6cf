"""Where one row of the faults happens: a folder, searches as real processes, a look at them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeAlias

import psutil
import yaml

from tests.faults.task import IMPORT_PATH, TRAINED
from topotune.bench.scaling.processes import Command, Processes
from topotune.records import EpochReport
from topotune.search.place.folder import SearchFolder
from topotune.tracking.entries import Epoch
from topotune.tracking.outbox import bodies_of

Seen: TypeAlias = Callable[[str], None]
"""Writes down what a row has seen, for the table that ``--table`` prints."""
NAME = "faulted"
"""The search of every row."""
STALL = 40.0
"""Seconds of ``limits.stall``; more than a worker takes to load its libraries on a busy machine."""
GONE_WITHIN = 20.0
"""Seconds from the first signal until every process of the search is gone."""
INTERRUPTED = 130
"""Exit code of a command that was interrupted."""


def recorded_epochs(folder: Path, trial: int) -> list[EpochReport]:
    """The epochs of a trial that a search's folder has on record, in their order."""
    bodies = bodies_of(folder, trial)
    return [body.report for body in bodies if isinstance(body, Epoch)]


class Driver(Command):
    """A running ``topotune`` command."""

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill -9, of this process alone."""
        self.process.kill()
        self.process.wait(30)

    def wait(self, seconds: float = 240.0) -> int:
        """Its exit code, within ``seconds``."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the command still runs after {seconds:g} s: {self.output()[-800:]}"
            ) from None

    def finish(self, code: int = 0, seconds: float = 240.0) -> str:
        """Wait for the end with this exit code and without a traceback; the output."""
        found = self.wait(seconds)
        text = self.output()
        assert found == code, f"exit code {found}, expected {code}: {text[-1500:]}"
        assert "Traceback (most recent call last)" not in text, f"a traceback: {text[-1500:]}"
        return text

    def works(self) -> None:
        """It has not ended."""
        assert self.process.poll() is None, f"the command has ended: {self.output()[-800:]}"

    def workers(self) -> list[psutil.Process]:
        """The processes that train, below it; there is one at least."""
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    title = " ".join(child.cmdline())
                    # Named after the actor while it waits, after Tune's wrapper while it trains.
                    actor = title.startswith(("ray::TrialActor", "ray::ResourceTrainable"))
                    if actor and child.ppid() not in {known.pid for known in found}:  # no fork
                        found.append(child)
        assert found, "no worker is running"
        return found


class Site(Processes):
    """A row's own folder and processes; leaving it ends whatever still runs.

    Args:
        folder: an empty folder.
        shared: a folder that rows share, for what is the same in all of them.

    Attributes:
        results: the results folder of its searches.
        root: the folder of its search.
        file: its search file.
    """

    def __init__(self, folder: Path, shared: Path) -> None:
        super().__init__(folder)
        self.shared = shared
        self.results = folder / "results"
        self.root = self.results / NAME
        self.file = folder / f"{NAME}.yaml"
        self._trained = folder / "trained.txt"

    def __enter__(self) -> Self:
        # Ray in this process leaves handlers of its own, which end it without a cleanup; and what
        # nohup ignores would be ignored by the commands, too.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
        self.shared.mkdir(parents=True, exist_ok=True)
        return super().__enter__()

    def search_file(self, options: Mapping[str, Any] | None = None, **changes: Any) -> Path:
        """A search file: four trials of three epochs, one at a time, about 0.4 s an epoch.

        Args:
            options: the task's options put over ``pause``.
            changes: top-level blocks put in place of the file's.
        """
        data = {
            "name": NAME,
            "task": {"name": IMPORT_PATH, "options": {"pause": 0.08, **(options or {})}},
            "method": "topological_adam",
            "space": {
                "lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
                "coupling": {"type": "categorical", "choices": ["uniform", "exchange"]},
            },
            "objective": {"metric": "val_accuracy", "direction": "maximize"},
            "budget": {"trials": 4, "epochs": 3},
            "pruner": "none",
            "train": {"batch_size": 32},
            "overhead": {"blocks": 0},
            "resources": {"concurrency": 1},
            **changes,
        }
        self.file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        return self.file

    def start(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, **popen: Any
    ) -> Driver:
        """Start ``topotune`` with these arguments and this site's ``--results-dir``."""
        command = [sys.executable, "-m", "topotune", *map(str, arguments)]
        command += ["--results-dir", str(self.results)]
        return Driver(*self.spawn(command, self.environment(env), **popen))

    def search(self, trial: int, epoch: int, *arguments: str, **start: Any) -> Driver:
        """Start the search of the site's file, and wait until a trial has recorded an epoch."""
        file = self.file if self.file.exists() else self.search_file()
        driver = self.start("search", file, *arguments, **start)
        self.reach(driver, trial, epoch)
        return driver

    def run(self, *arguments: str | Path, code: int = 0, seconds: float = 240.0) -> str:
        """Run ``topotune`` to its end, which must have this exit code; the output."""
        return self.start(*arguments).finish(code, seconds)

    def environment(self, changes: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of this site's processes."""
        return super().environment({TRAINED: str(self._trained), **(changes or {})})

    def trained(self) -> int:
        """Epochs that were begun to be trained, those trained again included."""
        return len(self._begun())

    def at_work(self) -> int:
        """Process id of the worker that began an epoch last."""
        return int(self._begun()[-1].split()[0])

    def _begun(self) -> list[bytes]:
        return self._trained.read_bytes().splitlines() if self._trained.exists() else []

    def all_gone(self, seconds: float = 15.0) -> float:
        """Wait until every process of this site has ended, within ``seconds``; how long it took."""
        return self.wait(lambda: not self.processes(), seconds, "processes are left", self._titles)

    def _titles(self) -> str:
        titles = []
        for process in self.processes():
            with suppress(psutil.Error):
                titles.append(" ".join(process.cmdline())[:80])
        return "; ".join(titles)

    def killed(self, driver: Driver) -> None:
        """Kill the driver, and wait until its workers have noticed."""
        driver.kill()
        self.all_gone(60)

    def reach(self, driver: Driver, trial: int, epoch: int, seconds: float = 120.0) -> float:
        """Wait until a trial has recorded an epoch, while the driver runs."""

        def reached() -> bool:
            driver.works()
            return any(report.epoch >= epoch for report in self.epochs(trial))

        return self.wait(reached, seconds, f"trial {trial} has not reached epoch {epoch}")

    def says(self, driver: Driver, word: str, seconds: float = 60.0) -> float:
        """Wait until a command has printed a word."""
        return self.wait(
            lambda: word in driver.output(), seconds, f"{word!r} is not said", driver.output
        )

    @property
    def kept(self) -> SearchFolder:
        """The folder of this site's search."""
        return SearchFolder.open(self.results, NAME)

    def epochs(self, trial: int) -> list[EpochReport]:
        """The epochs of a trial that are on record, in the order that they were written."""
        return recorded_epochs(self.root, trial)

    def status(self) -> dict[str, Any]:
        """What ``topotune status --json`` says of the search."""
        out = self.folder / "status.json"
        with out.open("wb") as file:
            command = self.start("status", NAME, "--json", stdout=file, stderr=subprocess.DEVNULL)
        code = command.wait()
        assert code == 0, f"'topotune status' ends with exit code {code}"
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found

    def interrupted(self, driver: Driver, began: float) -> str:
        """A driver that was signalled at ``began`` ends in time, with all its processes; its
        output."""
        output = driver.finish(INTERRUPTED, GONE_WITHIN - (time.monotonic() - began))
        self.all_gone(GONE_WITHIN - (time.monotonic() - began))
        return output

    def rows(self) -> dict[int, dict[str, Any]]:
        """The trials' rows of ``topotune status --json`` by number."""
        return {trial["number"]: trial for trial in self.status()["trials"]}

    def states(self) -> dict[int, str]:
        """Trial number to state."""
        return {number: row["state"] for number, row in self.rows().items()}
