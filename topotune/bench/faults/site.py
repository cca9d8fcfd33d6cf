"""Where one scenario happens: a folder, searches as real processes, and a look at them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from topotune.bench.faults.scenario import expect
from topotune.bench.faults.task import IMPORT_PATH, TRAINED
from topotune.records import EpochReport
from topotune.search.place.folder import SearchFolder
from topotune.tracking.entries import Epoch
from topotune.tracking.outbox import bodies_of

NAME = "faulted"
"""The search of every scenario."""
_MARK = "TOPOTUNE_FAULT_SITE"


def marked(name: str, value: str) -> list[psutil.Process]:
    """All living processes that began with this variable in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get(name) == value
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Driver:
    """A running ``topotune`` command; its output goes to a file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def output(self) -> str:
        """Standard output and error so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self, seconds: float = 240.0) -> int:
        """Its exit code.

        Raises:
            BrokenPromiseError: it runs for longer than ``seconds``.
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            expect(False, f"the command still runs after {seconds:g} s: {self.output()[-800:]}")
            raise

    def finish(self, code: int = 0, seconds: float = 240.0) -> str:
        """Wait for the end with this exit code and without a traceback; the output."""
        found = self.wait(seconds)
        text = self.output()
        expect(found == code, f"exit code {found}, expected {code}: {text[-1500:]}")
        expect("Traceback (most recent call last)" not in text, f"a traceback: {text[-1500:]}")
        return text

    def workers(self) -> list[psutil.Process]:
        """The processes that train, below it."""
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    title = " ".join(child.cmdline())
                    # Named after the actor while it waits, after Tune's wrapper while it trains.
                    actor = title.startswith(("ray::TrialActor", "ray::ResourceTrainable"))
                    if actor and child.ppid() not in {known.pid for known in found}:  # no fork
                        found.append(child)
        return found


class Site:
    """A scenario's own folder and processes; leaving it ends whatever is still running.

    Args:
        folder: an empty folder.
        shared: a folder that scenarios share, for what is the same in all of them.

    Attributes:
        results: the results folder of its searches.
    """

    def __init__(self, folder: Path, shared: Path) -> None:
        self.folder, self.shared = folder, shared
        self.results = folder / "results"
        self._trained = folder / "trained.txt"
        self._mark = uuid.uuid4().hex
        self._commands: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup: commands inherit that
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shared.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for command in self._commands:
            command.kill()
            command.wait()

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
        path = self.folder / f"{NAME}.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        return path

    def start(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, **popen: Any
    ) -> Driver:
        """Start ``topotune`` with these arguments and this site's ``--results-dir``."""
        command = [sys.executable, "-m", "topotune", *map(str, arguments)]
        command += ["--results-dir", str(self.results)]
        return Driver(*self.spawn(command, self.environment(env), **popen))

    def spawn(
        self, command: Sequence[str], environment: Mapping[str, str], **popen: Any
    ) -> tuple[subprocess.Popen[bytes], Path]:
        """Start any command, which ends with the site at the latest; its process and its log."""
        log = self.folder / f"command-{len(self._commands) + 1}.log"
        with log.open("wb") as out:
            outputs = {"stdout": out, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            process = subprocess.Popen(
                command, env=environment, cwd=self.folder, **{**outputs, **popen}
            )
        self._commands.append(process)
        return process, log

    def environment(self, changes: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of this site's processes, by which they are found again."""
        own = {_MARK: self._mark, TRAINED: str(self._trained), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own, **(changes or {})}

    def trained(self) -> int:
        """Epochs that were begun to be trained, those trained again included."""
        return len(self._begun())

    def at_work(self) -> int:
        """Process id of the worker that began an epoch last."""
        return int(self._begun()[-1].split()[0])

    def _begun(self) -> list[bytes]:
        return self._trained.read_bytes().splitlines() if self._trained.exists() else []

    def run(self, *arguments: str | Path, code: int = 0, seconds: float = 240.0) -> str:
        """Run ``topotune`` to its end, which must have this exit code; the output."""
        return self.start(*arguments).finish(code, seconds)

    def processes(self) -> list[psutil.Process]:
        """All living processes that this site's commands started, however detached."""
        return marked(_MARK, self._mark)

    def all_gone(self, seconds: float = 15.0) -> None:
        """Every process of this site ends within ``seconds``."""
        self.wait(lambda: not self.processes(), seconds, "processes are left", self._titles)

    def _titles(self) -> str:
        titles = []
        for process in self.processes():
            with suppress(psutil.Error):
                titles.append(" ".join(process.cmdline())[:80])
        return "; ".join(titles)

    def wait(
        self,
        condition: Callable[[], bool],
        seconds: float,
        what: str,
        seen: Callable[[], str] = str,
    ) -> float:
        """Wait until a condition holds; how long that took.

        Raises:
            BrokenPromiseError: it does not hold within ``seconds``; the text is ``what`` and
                ``seen()``.
        """
        began = time.monotonic()
        while not condition():
            waited = time.monotonic() - began
            expect(waited < seconds, f"{what} after {waited:.0f} s: {seen()}")
            time.sleep(0.05)
        return time.monotonic() - began

    def reach(self, driver: Driver, trial: int, epoch: int, seconds: float = 120.0) -> float:
        """Wait until a trial has recorded an epoch, while the driver runs."""

        def reached() -> bool:
            expect(
                driver.process.poll() is None, f"the command has ended: {driver.output()[-800:]}"
            )
            return any(report.epoch >= epoch for report in self.epochs(trial))

        return self.wait(reached, seconds, f"trial {trial} has not reached epoch {epoch}")

    @property
    def search(self) -> SearchFolder:
        """The folder of this site's search."""
        return SearchFolder.open(self.results, NAME)

    def epochs(self, trial: int) -> list[EpochReport]:
        """The epochs of a trial in the outbox, in the order that they were recorded."""
        bodies = bodies_of(self.results / NAME, trial)
        return [body.report for body in bodies if isinstance(body, Epoch)]

    def status(self) -> dict[str, Any]:
        """What ``topotune status --json`` says of the search."""
        out = self.folder / "status.json"
        with out.open("wb") as file:
            command = self.start("status", NAME, "--json", stdout=file, stderr=subprocess.DEVNULL)
        code = command.wait()
        expect(code == 0, f"'topotune status' ends with exit code {code}")
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found

    def states(self) -> dict[int, str]:
        """Trial number to state."""
        return {trial["number"]: trial["state"] for trial in self.status()["trials"]}
