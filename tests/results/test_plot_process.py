"""The process that draws: as here, with the reasons why not, and gone with whoever asked."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from topotune.errors import RunError
from topotune.results import plot_process
from topotune.results.plot_process import PlotProcess
from topotune.results.plots import plot_trace
from topotune.results.relaxation import plot_relaxation


@pytest.fixture
def plots() -> Iterator[PlotProcess]:
    process = PlotProcess()
    yield process
    process.close()


def trace(folder: Path) -> Path:
    steps = np.arange(50.0)
    np.savez(folder / "trace.npz", step=steps, loss=1 / (1 + steps), grad_norm=np.sin(steps) + 2)
    return folder / "trace.npz"


def children() -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process().children()
    return found


def drawn(plots: PlotProcess, source: Path, picture: Path) -> psutil.Process:
    """Draw a first figure; the process that did."""
    known = {child.pid for child in children()}
    plots.draw("trace", source, picture, "t")
    (process,) = (child for child in children() if child.pid not in known)
    return process


def test_it_draws_the_same_bytes_as_here_in_one_process(tmp_path: Path, plots: PlotProcess) -> None:
    source, title = trace(tmp_path), 'rings "$x", trial 3\n(PRUNED) Ü'
    plot_trace(source, tmp_path / "here.png", title)
    before = len(children())
    for name in ("there.png", "again.png"):
        plots.draw("trace", source, tmp_path / name, title)
        assert (tmp_path / name).read_bytes() == (tmp_path / "here.png").read_bytes()
    assert len(children()) == before + 1
    plots.close()
    assert len(children()) == before


def test_a_reason_why_not_is_the_one_that_drawing_here_gives(
    tmp_path: Path, plots: PlotProcess
) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"no archive")
    for kind, plot in (("trace", plot_trace), ("relaxation", plot_relaxation)):
        with pytest.raises(RunError) as here:
            plot(broken, tmp_path / "a.png", "t")
        with pytest.raises(RunError) as there:
            plots.draw(kind, broken, tmp_path / "a.png", "t")  # type: ignore[arg-type]
        assert str(there.value) == str(here.value)
    plots.draw("trace", trace(tmp_path), tmp_path / "a.png", "it goes on")


def test_one_that_was_killed_is_told_and_replaced(tmp_path: Path, plots: PlotProcess) -> None:
    source, picture = trace(tmp_path), tmp_path / "a.png"
    process = drawn(plots, source, picture)
    picture.unlink()
    process.kill()
    with pytest.raises(RunError, match=r"the process that draws has ended \(exit code -9\)"):
        plots.draw("trace", source, picture, "t")
    assert not picture.exists()
    plots.draw("trace", source, picture, "t")
    assert picture.exists()


def test_one_that_stands_still_is_not_waited_for_for_ever(
    tmp_path: Path, plots: PlotProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, picture = trace(tmp_path), tmp_path / "a.png"
    process = drawn(plots, source, picture)
    process.suspend()
    monkeypatch.setattr(plot_process, "DRAW_SECONDS", 0.5)
    with pytest.raises(RunError, match=r"did not answer for 0\.5 s"):
        plots.draw("trace", source, picture, "t")
    assert not process.is_running()


def test_waits_in_vain_end(
    tmp_path: Path, plots: PlotProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, picture = trace(tmp_path), tmp_path / "a.png"
    monkeypatch.setattr(plot_process, "START_SECONDS", 0.0)
    for _ in range(2):
        with pytest.raises(RunError, match="did not answer for 0 s"):
            plots.draw("trace", source, picture, "t")
    before = len(children())
    with pytest.raises(RunError, match="too often"):
        plots.draw("trace", source, picture, "t")
    assert len(children()) == before


def test_an_abort_ends_a_wait_and_is_the_last_word(tmp_path: Path, plots: PlotProcess) -> None:
    source, picture = trace(tmp_path), tmp_path / "a.png"
    before = len(children())
    process = drawn(plots, source, picture)
    process.suspend()
    timer = threading.Timer(0.5, plots.abort)
    timer.start()
    for reason in ("has ended", "not drawn any more"):
        with pytest.raises(RunError, match=reason):
            plots.draw("trace", source, picture, "t")
    timer.join()
    assert process.pid not in {child.pid for child in children()}
    assert len(children()) == before


def test_many_open_files_and_output_of_libraries_are_in_nobodys_way(
    tmp_path: Path, plots: PlotProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"no process may open more than {hard} files here")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("print('hello')\n", encoding="ascii")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        plots.draw("trace", trace(tmp_path), tmp_path / "a.png", "t")
    finally:
        for one in opened:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path / "a.png").exists()


OWNER = """
import sys, time
from pathlib import Path
from topotune.results.plot_process import PlotProcess
plots = PlotProcess()
plots.draw("trace", Path(sys.argv[1]), Path(sys.argv[2]), "t")
print(plots._process.pid, flush=True)
time.sleep(600)
"""


def test_it_ends_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", OWNER, str(trace(tmp_path)), str(tmp_path / "a.png")]
    owner = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        process = psutil.Process(int(owner.stdout.readline()))
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.communicate()
    end = time.monotonic() + 20
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_files_named_like_libraries_are_not_run(
    tmp_path: Path, plots: PlotProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "matplotlib", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)\n", encoding="ascii")
    source = trace(tmp_path)
    monkeypatch.chdir(tmp_path)
    plots.draw("trace", source, tmp_path / "a.png", "t")
    assert (tmp_path / "a.png").exists()
