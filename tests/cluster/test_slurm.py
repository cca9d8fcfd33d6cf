"""cluster/slurm.sbatch through a real Slurm of two nodes: drained on its signal, then gone on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.cluster_files import CLUSTER, ROOT
from tests.slurm_site import Slurm, missing, search_path

pytestmark = [pytest.mark.cluster_full, pytest.mark.timeout(600)]

SEARCH = """
name: paced
task: {name: "tests.paced_task:Paced", options: {pause: 0.1}}
method: adam
space: {lr: {type: float, low: 1.0e-4, high: 1.0e-1, log: true}}
objective: {metric: val_accuracy, direction: maximize}
budget: {trials: 3, epochs: 10}
pruner: none
resources: {cpus: 1, concurrency: auto}
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if reason := missing():
        pytest.skip(reason)
    with TemporaryDirectory(prefix="tt-") as folder, Slurm(Path(folder)) as site:
        (site.folder / "paced.yaml").write_text(SEARCH, encoding="utf-8")
        yield site


def submit(site: Slurm) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{search_path()}"
    job = site.ask(
        "sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", "--output=%j.log",
        str(CLUSTER / "slurm.sbatch"), "paced.yaml", "paced", PATH=path, PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert job.isdecimal()
    return job


def status(site: Slurm) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "topotune", "status", "paced", "--json"],
        cwd=site.folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def left_over(site: Slurm, job: str) -> list[Path]:
    """What a job should have taken with it."""
    paths = [Path(f"/tmp/topotune-{job}"), site.folder / f".topotune-{job}"]
    return [path for path in paths if path.exists()]


def test_a_search_is_drained_and_gone_on_with(slurm: Slurm) -> None:
    first = submit(slurm)
    token = slurm.folder / f".topotune-{first}" / "ray_token"
    log = slurm.folder / f"{first}.log"
    over = time.monotonic() + 240
    while not (log.exists() and "2 running" in log.read_text(encoding="utf-8", errors="replace")):
        assert time.monotonic() < over, log.read_text()[-3000:]
        assert slurm.ask("squeue", "-h", "-j", first) != "", log.read_text()[-3000:]
        time.sleep(1)
    assert token.stat().st_mode & 0o077 == 0
    assert token.parent.stat().st_mode & 0o077 == 0
    secret = token.read_text(encoding="ascii").strip()

    slurm.ask("scancel", "--signal=TERM", "--batch", first)
    job = slurm.wait(first, 90)
    assert job["ExitCode"] == "130:0", log.read_text()[-3000:]
    assert left_over(slurm, first) == []
    assert secret not in log.read_text(encoding="utf-8", errors="replace")
    assert status(slurm)["state"] != "finished"

    second = submit(slurm)
    job = slurm.wait(second, 240)
    text = (slurm.folder / f"{second}.log").read_text(encoding="utf-8", errors="replace")
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), text[-3000:]
    assert left_over(slurm, second) == []
    found = status(slurm)
    assert found["state"] == "finished"
    assert found["counts"]["COMPLETE"] == 3


def test_it_says_how_it_is_used() -> None:
    done = subprocess.run(
        ["bash", str(CLUSTER / "slurm.sbatch")], capture_output=True, text=True, cwd=CLUSTER
    )
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr
