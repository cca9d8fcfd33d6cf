"""The figures of a search, drawn when somebody looks: of the search itself, and of its trials.

No driver draws a trial: matplotlib holds the interpreter for a quarter of a second a figure, while
workers wait for their next trial.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from topotune.errors import RunError, TrackingError
from topotune.records import Outcome, TrialSummary
from topotune.results.leaderboard import Leaderboard
from topotune.search.place.folder import SearchFolder
from topotune.search.place.objects.pull import fetch
from topotune.train.trace import RELAXATION_FILE, TRACE_FILE

if TYPE_CHECKING:
    from topotune.tracking.mlflow import MlflowStore
    from topotune.tracking.store import StoredRun

HISTORY = "history.png"
TRACE = "trace.png"
"""The figures that are stored last: where MLflow has them, it has the others of the run, too."""
DIVERGED_SENT = 10
"""So many diverged trials, the newest ones, have their figures among MLflow's pages."""


def draw_search(board: Leaderboard, out: Path) -> list[Path]:
    """Draw a search's history, its trials' curves and, of several objectives, their front.

    Args:
        board: the search's trials; none gives no figure.
        out: the folder for the pictures, made if it is missing.

    Raises:
        ResourceError: a picture cannot be written.
    """
    from topotune.results.plots import plot_curves, plot_front, plot_history

    if not board.trials:
        return []
    plots = {"front.png": plot_front} if len(board.objectives) > 1 else {}
    plots |= {"curves.png": plot_curves, HISTORY: plot_history}
    for name, plot in plots.items():
        plot(board, out / name)
    return [out / name for name in plots]


def draw_trial(folder: SearchFolder, row: TrialSummary, out: Path) -> list[Path]:
    """Draw what an ended trial has recorded: its steps and, of a network that relaxes, relaxations.

    Args:
        folder: the search.
        row: the trial; one that recorded no step, or has not ended, gives no figure.
        out: the folder for the pictures, made if it is missing.

    Raises:
        RunError: a record is damaged.
        ResourceError: a picture cannot be written, or the search's store cannot be asked.
    """
    from topotune.results.relaxation import plot_relaxation
    from topotune.results.trace import plot_trace

    fetch(folder.root.parent, folder.name, TRACE_FILE, RELAXATION_FILE, trial=row.number)
    drawn = []
    for name, plot in {RELAXATION_FILE: plot_relaxation, TRACE_FILE: plot_trace}.items():
        source = folder.trial(row.number) / name
        if source.exists():
            picture = out / source.with_suffix(".png").name
            plot(source, picture, f"{folder.name}, trial {row.number} ({row.state})")
            drawn.append(picture)
    return drawn


def send_figures(
    folder: SearchFolder,
    board: Leaderboard,
    finished: bool,
    store: MlflowStore,
    parent: StoredRun,
    say: Callable[[str], None],
) -> None:
    """Draw those figures that MLflow lacks, and store them with the runs of search and trials.

    These are the search's own, and those of the trials that people look at: the best, as many as
    keep their checkpoints, and the diverged. What is stored is drawn again only of a search that
    is not finished.

    Args:
        folder: the search.
        board: its trials.
        finished: whether nothing is left to do, so that its own figures stay as they are.
        store: where its runs are.
        parent: the search's own run.
        say: gets a line on what was drawn, or why something was not.
    """
    best = board.top(folder.config().keep_checkpoints)
    diverged = [row for row in board.trials if row.state == Outcome.DIVERGED]
    diverged.sort(key=lambda row: row.number)
    count = _send(store, parent, partial(draw_search, board), "" if not finished else HISTORY)
    for row in (*best, *diverged[-DIVERGED_SENT:]):
        runs = [run for run in store.runs(folder.search_id, row.number) if not run.deleted]
        try:
            count += _send(store, next(iter(runs), None), partial(draw_trial, folder, row), TRACE)
        except TrackingError:
            raise
        except RunError as error:  # its own files are damaged
            say(f"warning: {folder.name}: a figure of trial {row.number} is missing: {error}")
    if count:
        say(f"{folder.name}: {count} figures drawn and stored with its runs")


def _send(
    store: MlflowStore, run: StoredRun | None, draw: Callable[[Path], list[Path]], last: str
) -> int:
    """Store the figures of a run, unless it has the last one of them; how many."""
    if run is None or last in store.artifact_names(run.run_id):
        return 0
    with tempfile.TemporaryDirectory(prefix="topotune-figures-") as scratch:
        drawn = draw(Path(scratch))
        for picture in drawn:
            store.log_artifact(run.run_id, picture, "")
    return len(drawn)
