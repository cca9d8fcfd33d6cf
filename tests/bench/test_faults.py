"""``topotune bench faults`` leaves nothing behind when it is stopped."""

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

from topotune.bench.faults.scenario import BrokenPromiseError
from topotune.bench.faults.site import Site, marked
from topotune.bench.faults.tracking import MEASURED, SlowedError, measured


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
            assert measured(row)(site).count("1.2") == slowed
        else:
            with pytest.raises(BrokenPromiseError, match="slower"):
                measured(row)(site)
    assert len(places) == min(slowed + 1, MEASURED)
    assert places[0][1] == tmp_path / "shared"
    for kind in zip(*places, strict=True):  # nothing of one attempt is used in the next
        assert len(set(kind)) == len(kind)


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_bench_ends_its_searches_and_removes_its_folder(
    number: signal.Signals, tmp_path: Path
) -> None:
    bench = subprocess.Popen(
        [sys.executable, "-m", "topotune", "bench", "faults", "--row", "worker-killed"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ours() -> list[psutil.Process]:
        return marked("TMPDIR", str(tmp_path))

    try:
        deadline = time.monotonic() + 100
        while not any("topotune search" in title for title in titles(ours())):
            assert bench.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert list(tmp_path.glob("topotune-faults-*"))
        bench.send_signal(number)
        assert bench.wait(60) == 130
        deadline = time.monotonic() + 15  # what only follows its parent: Python's resource tracker
        while titles(ours()):
            assert time.monotonic() < deadline, titles(ours())
            time.sleep(0.1)
        assert not list(tmp_path.glob("topotune-faults-*"))
    finally:
        for process in ours():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        bench.wait(10)
