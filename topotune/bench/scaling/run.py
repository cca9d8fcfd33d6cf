"""One search of ``bench scaling``: a cluster with so many slots, a driver, and what they used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from topotune.bench.scaling.numbers import (
    Epoch,
    Load,
    Sample,
    Spread,
    Window,
    pauses,
    spent,
    steady,
)
from topotune.bench.scaling.processes import Command, Node, Processes, start_head, with_token
from topotune.bench.scaling.task import IMPORT_PATH, POINTS, SLEPT
from topotune.errors import RunError
from topotune.records import Outcome

NAME = "scaling"
SAMPLE_SECONDS = 0.25
LIMIT_SECONDS = 600.0
PARTS = ("driver", "ray", "helpers", "workers")
"""Processes whose CPU time is counted: the driver with all its threads; gcs_server and the raylets
of both nodes; what else serves Ray's nodes; the workers, those that only stand by included."""
_TOPOTUNE = (sys.executable, "-m", "topotune")
_SERVICES = ("gcs_server", "raylet")
_MEMORY = ("--object-store-memory", str(100 * 2**20))


@dataclass(frozen=True)
class Plan:
    """A search to run.

    Attributes:
        slots: logical CPUs of the one node that runs trials, and trials at once.
        trials: of the search.
        epochs: of a trial.
        sleep: seconds of an epoch; 0 saturates the driver.
    """

    slots: int
    trials: int
    epochs: int
    sleep: float

    @property
    def ideal(self) -> float:
        """Trials an hour if a slot did nothing but sleep; infinite where it does not sleep."""
        seconds = self.epochs * self.sleep
        return self.slots * 3600 / seconds if seconds else float("inf")


@dataclass(frozen=True)
class Run:
    """What one search showed. All but the times of the whole are of its steady state.

    Attributes:
        plan: the search.
        window: its steady state.
        workers: processes that trained; more than slots where Ray replaced one.
        start: seconds from the command to the first trial's first epoch.
        close: seconds from the last trial's last epoch to the command's end.
        whole: seconds of the command.
        cpu: CPU seconds, user and system, of ``PARTS``.
        between_trials: seconds of a slot from the end of a trial's last sleep to the begin of the
            next trial's first one.
        between_epochs: the same within a trial.
        load: the machine's load average, over the minute before the run.
    """

    plan: Plan
    window: Window
    workers: int
    start: float
    close: float
    whole: float
    cpu: Mapping[str, float]
    between_trials: Spread
    between_epochs: Spread | None
    load: float

    @property
    def hourly(self) -> float:
        """Trials an hour."""
        return 3600 * self.window.rate

    @property
    def cores(self) -> float:
        """Cores that the driver kept busy."""
        return self.cpu["driver"] / self.window.seconds

    @property
    def driver_load(self) -> Load:
        """What the driver spent its CPU time on."""
        window = self.window
        return Load(window.seconds, window.trials, window.epochs, self.cpu["driver"])


def measure(plan: Plan, folder: Path) -> Run:
    """Run the search on a cluster of its own: a head without slots and one node with all of them.

    Args:
        plan: the search.
        folder: an empty one, for all that it writes.

    Raises:
        RunError: the search does not end well, or not all of its trials do.
        ValueError: the run was too short for a steady state.
    """
    load = os.getloadavg()[0]
    log, results = folder / "slept.txt", ["--results-dir", str(folder / "results")]
    with Processes(folder) as site:
        environment = site.environment({**with_token(), SLEPT: str(log)})
        head, address = start_head(site, environment)
        slots = (f"--address={address}", f"--num-cpus={plan.slots}", *_MEMORY)
        node = Node(site, environment, *slots)
        services = [*head.processes(), *node.processes()]
        file = folder / f"{NAME}.yaml"
        file.write_text(yaml.safe_dump(_search(plan), sort_keys=False), encoding="utf-8")
        began = time.monotonic()
        command = [*_TOPOTUNE, "search", str(file), "--ray-address", address, *results]
        driver = Command(*site.spawn(command, environment))
        samples = _watch(driver, node, services)
        ended = time.monotonic()
        if driver.process.returncode:
            raise RunError(f"exit code {driver.process.returncode}: {driver.output()[-1500:]}")
        status = subprocess.run(
            [*_TOPOTUNE, "status", NAME, "--json", *results], stdout=subprocess.PIPE, check=True
        )
    counts = json.loads(status.stdout)["counts"]
    if counts != {Outcome.COMPLETE: plan.trials}:
        raise RunError(f"{plan.trials} trials were asked for, these came out: {counts}")
    return _run(plan, read_log(log), samples, began, ended, load)


def _search(plan: Plan) -> dict[str, Any]:
    return {
        "name": NAME,
        "task": {"name": IMPORT_PATH, "options": {"sleep": plan.sleep}},
        "method": "topological_adam",
        "space": {
            "lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
            "coupling": {"type": "categorical", "choices": ["uniform", "exchange"]},
        },
        "objective": {"metric": "val_accuracy", "direction": "maximize"},
        "budget": {"trials": plan.trials, "epochs": plan.epochs},
        "pruner": "none",
        "train": {"batch_size": POINTS},
        "overhead": {"blocks": 0},
        "resources": {"concurrency": plan.slots},
    }


def read_log(path: Path) -> list[Epoch]:
    """The epochs that :class:`~topotune.bench.scaling.task.SleepingRings` wrote down."""
    lines = path.read_text(encoding="ascii").splitlines()
    return [Epoch(int(w), float(b), float(e)) for w, b, e in map(str.split, lines)]


def _watch(driver: Command, node: Node, services: list[psutil.Process]) -> list[Sample]:
    """Samples of what all parts use, until the driver ends."""
    parts: dict[str, list[psutil.Process]] = {
        "driver": [psutil.Process(driver.pid)],
        "ray": [one for one in services if one.name() in _SERVICES],
        "helpers": [one for one in services if one.name() not in _SERVICES],
        "workers": [],
    }
    known = {one.pid for one in services}
    used: dict[int, float] = {}
    samples = []
    deadline = time.monotonic() + LIMIT_SECONDS
    look = 0.0
    while driver.process.poll() is None:
        now = time.monotonic()
        if now > deadline:
            raise RunError(f"the search runs for {LIMIT_SECONDS:.0f} s: {driver.output()}")
        if now >= look:  # costs more than all samples together
            look = now + 2.0
            fresh = [one for one in node.processes() if one.pid not in known]
            known |= {one.pid for one in fresh}
            parts["workers"] += fresh
        for process in (one for part in parts.values() for one in part):
            with suppress(psutil.Error):  # one that has ended has used what it had used
                times = process.cpu_times()
                used[process.pid] = times.user + times.system
        cpu = {name: sum(used.get(p.pid, 0.0) for p in part) for name, part in parts.items()}
        samples.append(Sample(time.monotonic(), cpu))
        time.sleep(SAMPLE_SECONDS)
    return samples


def _run(
    plan: Plan,
    epochs: list[Epoch],
    samples: list[Sample],
    began: float,
    ended: float,
    load: float,
) -> Run:
    window = steady(epochs, plan.epochs)
    trials, within = pauses(epochs, plan.epochs, window.begin)
    used = {part: spent(samples, part, window.begin, window.end) for part in PARTS}
    return Run(
        plan=plan,
        window=window,
        workers=len({epoch.worker for epoch in epochs}),
        start=min(epoch.begin for epoch in epochs) - began,
        close=ended - window.end,
        whole=ended - began,
        cpu=used,
        between_trials=Spread.quartiles(trials),
        between_epochs=Spread.quartiles(within) if within else None,
        load=load,
    )
