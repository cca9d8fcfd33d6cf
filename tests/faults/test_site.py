"""The rows' own tools: a site leaves nothing behind, and what is slow is measured again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.faults.site import Site
from tests.faults.test_tracking import MEASURED, SlowedError, measured
from tests.tables import spread
from topotune.bench.scaling.processes import marked


def titles(processes: list[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        with suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return found


def test_a_site_that_is_left_ends_its_commands_and_waits_for_them(tmp_path: Path) -> None:
    with Site(tmp_path / "site", tmp_path / "shared") as site:
        marked_one, _ = site.spawn(["sleep", "300"], site.environment())
        unmarked, _ = site.spawn(["sleep", "300"], {})
    assert [marked_one.returncode, unmarked.returncode] == [-signal.SIGKILL, -signal.SIGKILL]


@pytest.mark.parametrize("slowed", range(MEASURED + 1))
def test_slowed_epochs_are_measured_again_on_both_sides_and_not_for_ever(
    slowed: int, tmp_path: Path
) -> None:
    places: list[tuple[Path, Path]] = []

    def row(site: Site) -> str:
        places.append((site.folder, site.shared))
        if len(places) <= slowed:
            raise SlowedError("1.2 times as long")
        return "held"

    with Site(tmp_path / "site", tmp_path / "shared") as site:
        if slowed < MEASURED:
            assert measured(site, row).count("1.2") == slowed
        else:
            with pytest.raises(AssertionError, match="slower"):
                measured(site, row)
    assert len(places) == min(slowed + 1, MEASURED)
    assert places[0][1] == tmp_path / "shared"
    for kind in zip(*places, strict=True):  # nothing of one attempt is used in the next
        assert len(set(kind)) == len(kind)


def test_a_table_gives_the_range_of_each_number() -> None:
    texts = ["epoch 3 came 9.5 s after", "epoch 3 came 10.25 s after", "epoch 4 came 9.75 s after"]
    assert spread(texts) == "epoch 3 to 4 came 9.5 to 10.25 s after"
    assert spread(["gone", "1 left", "gone"]) == "gone | 1 left"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("number", "jobs"), [(signal.SIGTERM, "0"), (signal.SIGINT, "0"), (signal.SIGTERM, "1")]
)
def test_a_stopped_row_ends_its_searches(number: signal.Signals, jobs: str, tmp_path: Path) -> None:
    rows = Path(__file__).parent / "test_workers.py"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    pytest_run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-n", jobs, f"{rows}::test_worker_killed", "-m", "faults"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ours() -> list[psutil.Process]:
        return marked("TMPDIR", str(tmp_path))

    try:
        deadline = time.monotonic() + 100
        while not any("topotune search" in title for title in titles(ours())):
            assert pytest_run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        pytest_run.send_signal(number)
        assert pytest_run.wait(60) == pytest.ExitCode.INTERRUPTED
        deadline = time.monotonic() + 15  # what only follows its parent: Python's resource tracker
        while titles(ours()):
            assert time.monotonic() < deadline, titles(ours())
            time.sleep(0.1)
    finally:
        for process in ours():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        pytest_run.wait(10)
