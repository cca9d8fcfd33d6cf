"""Faults of the disk that the results lie on: full, or suddenly read-only. They need root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.invariants import audit
from tests.faults.site import NAME, Driver, Seen, Site

SIZE = "48m"
STOP_SECONDS = 60.0
"""How long a search may take to stop after its disk failed."""
EARLY_SECONDS = 120.0
"""How long a resume may take that comes too early: it may start all of Ray before it fails."""


@pytest.mark.faults
def test_disk_full(site: Site, seen: Seen) -> None:
    """Results disk full in the middle of a search: clear stop with path and fix; nothing corrupt;
    resume works after space is made."""
    with small_disk(site.results):
        driver = site.search(1, 1)
        filler = fill(site.results)
        said = stopped(driver, "ake space")
        site.all_gone()
        site.start("resume", NAME).wait(EARLY_SECONDS)  # refused, and harmless
        filler.unlink()
        site.run("resume", NAME)
        seen(f"{said[:90]}...; {audit(site)}")


@pytest.mark.faults_full
def test_disk_read_only(site: Site, seen: Seen) -> None:
    """Results folder read-only in the middle of a search: clear stop with path and fix; nothing
    corrupt; resume works afterwards."""
    with small_disk(site.results):
        driver = site.search(1, 1)
        # Files that are open for writing forbid a remount; a read-only mount over it is allowed.
        mount("--bind", str(site.results), str(site.results))
        mount("-o", "remount,bind,ro", str(site.results))
        said = stopped(driver, "ead-only", "writable")
        site.all_gone()
        early = site.start("resume", NAME)
        assert early.wait(EARLY_SECONDS) == 2, f"resumed: {early.output()[-500:]}"
        subprocess.run(["umount", str(site.results)], check=True)
        site.run("resume", NAME)
        seen(f"{said[:90]}...; {audit(site)}")


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A tmpfs on a folder."""
    folder.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder))
    try:
        yield
    finally:
        while os.path.ismount(folder):
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"cannot mount (this row needs root): {done.stderr.strip()}"


def fill(disk: Path) -> Path:
    """Fill a disk to its last byte; the file that does."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError:
                continue
    return filler


def stopped(driver: Driver, *words: str) -> str:
    """The driver ends by itself, in words; the last of them."""
    code = driver.wait(STOP_SECONDS)
    text = " ".join(driver.output().split())
    assert code in (1, 2), f"exit code {code}: {text[-800:]}"
    assert "Traceback (most recent call last)" not in text, f"a traceback: {text[-1500:]}"
    last = text[text.rfind("error: ") :]
    assert last.startswith("error: "), f"it does not say why: {text[-800:]}"
    for word in (*words, NAME, "resume"):
        assert word in last, f"{word!r} is not said: {last}"
    return last
