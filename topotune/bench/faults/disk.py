"""Faults of the disk that the results lie on: full, or suddenly read-only. They need root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from topotune.bench.faults.invariants import audit
from topotune.bench.faults.scenario import Scenario, expect
from topotune.bench.faults.site import NAME, Driver, Site

_SIZE = "48m"
STOP_SECONDS = 60.0
"""How long a search may take to stop after its disk failed."""
EARLY_SECONDS = 120.0
"""How long a resume may take that comes too early: it may start all of Ray before it fails."""


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A tmpfs on a folder."""
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(folder))
    try:
        yield
    finally:
        while os.path.ismount(folder):
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    expect(done.returncode == 0, f"cannot mount (this row needs root): {done.stderr.strip()}")


def _fill(disk: Path) -> Path:
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


def _stopped(driver: Driver, words: tuple[str, ...]) -> str:
    """The driver ends by itself, in words; the last of them."""
    code = driver.wait(STOP_SECONDS)
    text = " ".join(driver.output().split())
    expect(code in (1, 2), f"exit code {code}: {text[-800:]}")
    expect("Traceback (most recent call last)" not in text, f"a traceback: {text[-1500:]}")
    last = text[text.rfind("error: ") :]
    expect(last.startswith("error: "), f"it does not say why: {text[-800:]}")
    for word in (*words, NAME, "resume"):
        expect(word in last, f"{word!r} is not said: {last}")
    return last


def _disk_full(site: Site) -> str:
    with _small_disk(site.results):
        driver = site.start("search", site.search_file())
        site.reach(driver, 1, 1)
        filler = _fill(site.results)
        said = _stopped(driver, ("ake space",))
        site.all_gone()
        site.start("resume", NAME).wait(EARLY_SECONDS)  # refused, and harmless
        filler.unlink()
        site.run("resume", NAME)
        return f"{said[:90]}...; {audit(site)}"


def _disk_read_only(site: Site) -> str:
    with _small_disk(site.results):
        driver = site.start("search", site.search_file())
        site.reach(driver, 1, 1)
        # Files that are open for writing forbid a remount; a read-only mount over it is allowed.
        _mount("--bind", str(site.results), str(site.results))
        _mount("-o", "remount,bind,ro", str(site.results))
        said = _stopped(driver, ("ead-only", "writable"))
        site.all_gone()
        early = site.start("resume", NAME)
        expect(early.wait(EARLY_SECONDS) == 2, f"resumed: {early.output()[-500:]}")
        subprocess.run(["umount", str(site.results)], check=True)
        site.run("resume", NAME)
        return f"{said[:90]}...; {audit(site)}"


DISK = (
    Scenario(
        "disk-full",
        "results disk full in the middle of a search",
        "clear stop with path and fix; nothing corrupt; resume works after space is made",
        _disk_full,
        60,
    ),
    Scenario(
        "disk-read-only",
        "results folder read-only in the middle of a search",
        "clear stop with path and fix; nothing corrupt; resume works afterwards",
        _disk_read_only,
        60,
    ),
)
