"""The figures of a search are drawn when somebody looks: by ``plot`` and by ``dashboard``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from tests.search.test_exports import trained
from tests.search_cases import Desk, make_config
from topotune.cli.main import app
from topotune.results import figure as fig
from topotune.search import figures
from topotune.search.drive.recorder import Recorder, leaderboard
from topotune.search.place.shipping import open_store
from topotune.search.status import sync
from topotune.train.trace import TRACE_FILE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's use of SQLAlchemy

GOALS = [
    {"metric": "val_accuracy", "direction": "maximize"},
    {"metric": "train_loss", "direction": "minimize"},
]


def recorded(results: Path, outcome: str = "COMPLETE", **changes: Any) -> Desk:
    """A search of two trials, trained and recorded as its driver records it."""
    desk = trained(results, **{"budget": {"trials": 2, "epochs": 2}, **changes})
    recorder = Recorder(desk.folder, desk.config)
    recorder.start({})
    rows = desk.rows()
    recorder.recover(rows)
    for row in rows:
        recorder.ended(row)
    deadline = time.monotonic() + 60
    while not all((desk.folder.trial(row.number) / TRACE_FILE).exists() for row in rows):
        assert time.monotonic() < deadline
        time.sleep(0.01)  # a stop leaves what is not joined by then to the resume
    desk.ledger.save()
    recorder.close(leaderboard(desk.folder, desk.config), outcome, "")
    return desk


def plot(results: Path, *arguments: str) -> Any:
    """The command's end: what it prints, its exit code and its error."""
    return CliRunner().invoke(app, ["plot", "demo", "--results-dir", str(results), *arguments])


def pictures(folder: Path) -> set[str]:
    """The pictures below a folder, each looked at: text width, and something drawn."""
    found = set()
    for path in folder.rglob("*.png"):
        image = imread(path)
        assert image.shape[1] == fig.WIDTH * fig.DPI
        assert image[:, :, :3].min() < 0.5
        found.add(path.relative_to(folder).as_posix())
    return found


def test_a_search_leaves_its_trials_undrawn_and_plot_draws_them(tmp_path: Path) -> None:
    root = recorded(tmp_path / "results", objective=GOALS).folder.root
    assert pictures(root) == {"history.png", "curves.png", "front.png"}
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    done = plot(tmp_path / "results", "--trial", "1", "--out", str(tmp_path / "one"), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == [str(tmp_path / "one" / "trial-0001" / "trace.png")]
    assert pictures(tmp_path / "one") == {"trial-0001/trace.png"}
    done = plot(tmp_path / "results", "--all", "--out", str(tmp_path / "all"))
    assert done.exit_code == 0, done.output
    own = {"history.png", "curves.png", "front.png"}
    traces = {"trial-0000/trace.png", "trial-0001/trace.png"}
    assert pictures(tmp_path / "all") == own | traces
    assert {tmp_path / "all" / name for name in own | traces} == set(map(Path, done.stdout.split()))
    for name in own:
        assert (tmp_path / "all" / name).read_bytes() == (root / name).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_plot_draws_the_search_into_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(tmp_path / "results", "INTERRUPTED")
    monkeypatch.chdir(tmp_path)
    assert plot(tmp_path / "results").exit_code == 0
    assert pictures(tmp_path / "topotune-plots") == {"demo/history.png", "demo/curves.png"}


def test_what_plot_cannot_draw_is_said(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "results", make_config())
    desk.store.close()
    out = ("--out", str(tmp_path / "out"))
    assert "nothing is recorded yet" in str(plot(tmp_path / "results", *out).exception)
    lost = plot(tmp_path / "results", "--trial", "7", *out)
    assert "has no trial 7. 'topotune status demo' lists its trials" in str(lost.exception)
    both = plot(tmp_path / "results", "--trial", "7", "--all", *out)
    assert "--all: draws every trial, --trial those that are named" in str(both.exception)
    assert not (tmp_path / "out").exists()


def test_a_trial_without_steps_is_named_and_a_damaged_record_refused(tmp_path: Path) -> None:
    desk = recorded(tmp_path / "results")
    (desk.folder.trial(0) / TRACE_FILE).unlink()
    done = plot(tmp_path / "results", "--all", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "trial 0 (COMPLETE) has no steps to draw" in done.stderr
    assert pictures(tmp_path / "out") == {"history.png", "curves.png", "trial-0001/trace.png"}
    alone = plot(tmp_path / "results", "--trial", "0", "--out", str(tmp_path / "none"))
    assert "nothing is recorded yet that could be drawn" in str(alone.exception)
    (desk.folder.trial(1) / TRACE_FILE).write_bytes(b"no archive")
    broken = plot(tmp_path / "results", "--trial", "1", "--out", str(tmp_path / "none"))
    assert f"{TRACE_FILE}: not a readable .npz trace" in str(broken.exception)


def test_mlflow_gets_the_figures_that_people_look_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = recorded(tmp_path, "INTERRUPTED", keep_checkpoints=1)
    assert sync(tmp_path, "demo", 60.0)[1]
    store = open_store(desk.folder, desk.config)
    parent = store.parent(desk.folder.search_id)
    assert parent is not None
    board, said = leaderboard(desk.folder, desk.config), list[str]()

    def send(finished: bool = True) -> str:
        said.clear()
        figures.send_figures(desk.folder, board, finished, store, parent, said.append)
        return ", ".join(said)

    def stored(trial: int | None) -> set[str]:
        run = parent if trial is None else store.runs(desk.folder.search_id, trial)[0]
        return {name for name in store.artifact_names(run.run_id) if name.endswith(".png")}

    assert not stored(None)
    assert board.best is not None
    best, other = board.best.number, 1 - board.best.number
    assert send() == "demo: 3 figures drawn and stored with its runs"
    assert stored(None) == {"history.png", "curves.png"}
    assert (stored(best), stored(other)) == ({"trace.png"}, set())
    assert pictures(tmp_path / "mlflow" / "artifacts")
    assert send() == ""  # MLflow has them
    assert send(finished=False) == "demo: 2 figures drawn and stored with its runs"
    monkeypatch.setattr(type(store), "artifact_names", lambda store, run_id: set())
    (desk.folder.trial(best) / TRACE_FILE).write_bytes(b"no archive")
    text = send()
    assert f"warning: demo: a figure of trial {best} is missing: " in text
    assert text.endswith("demo: 2 figures drawn and stored with its runs")


def test_diverged_trials_are_among_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = recorded(tmp_path, keep_checkpoints=1)
    assert sync(tmp_path, "demo", 60.0)[1]
    board = leaderboard(desk.folder, desk.config)
    lost = board.trials[1]
    ended = type(board).of(
        [board.trials[0], type(lost).from_dict({**lost.to_dict(), "state": "DIVERGED"})],
        "demo",
        board.objectives,
    )
    store = open_store(desk.folder, desk.config)
    parent = store.parent(desk.folder.search_id)
    assert parent is not None
    said = list[str]()
    figures.send_figures(desk.folder, ended, True, store, parent, said.append)
    assert said == ["demo: 2 figures drawn and stored with its runs"]  # its own are recorded
    (run,) = store.runs(desk.folder.search_id, lost.number)
    assert "trace.png" in store.artifact_names(run.run_id)


@pytest.mark.heavy
def test_the_dashboard_stores_them_while_it_serves(tmp_path: Path) -> None:
    desk = recorded(tmp_path, "INTERRUPTED")
    assert sync(tmp_path, "demo", 60.0)[1]
    command = ["-m", "topotune", "dashboard", "demo", "--port", "0", "--results-dir", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = []
            while (line := process.stdout.readline()) and "drawn" not in line:
                said.append(line)
        finally:
            process.send_signal(signal.SIGINT)
            after, errors = process.communicate(timeout=200)
    assert (process.returncode, after, errors) == (0, "", "")
    assert line == "demo: 4 figures drawn and stored with its runs\n"
    assert said[-1] == "Ctrl-C ends it\n"
    names = [Path(name).name for name in pictures(tmp_path / "mlflow" / "artifacts")]
    assert sorted(names) == ["curves.png", "history.png", "trace.png", "trace.png"]
    assert not list(desk.folder.root.rglob("*.png"))
