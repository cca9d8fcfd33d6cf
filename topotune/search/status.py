"""Look at searches without driving them: status, the dashboard, and a late shipment."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from topotune.config.models import SearchConfig
from topotune.config.rules import planned_trials
from topotune.errors import (
    ConfigError,
    ResourceError,
    RunError,
    SearchFolderError,
    TopotuneError,
)
from topotune.results.leaderboard import Leaderboard, standing
from topotune.search.drive.recorder import board_of
from topotune.search.figures import draw_search, draw_trial, send_figures
from topotune.search.live import Live
from topotune.search.place.folder import SearchFolder, searches
from topotune.search.place.objects.address import store_address
from topotune.search.place.objects.pull import fetch
from topotune.search.place.output import ERROR_FILE, OUTPUT_FILE, read
from topotune.search.place.search_lease import SearchLease
from topotune.search.place.search_lease import holder as holder_of
from topotune.search.place.shipping import default_server, open_store
from topotune.search.study.rows import read_study, summaries
from topotune.search.view import SilentListener
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.pages import VIEW_TAG, experiment_page, run_page, trials_page
from topotune.tracking.serve import Dashboard, check_port, serve_dashboard
from topotune.tracking.shipper import Shipper
from topotune.tracking.store import DATABASE_FILE, embedded_artifacts


@dataclass(frozen=True)
class SearchStatus:
    """One search as its files show it.

    Attributes:
        folder: where it lies.
        config: what it searches.
        board: its trials.
        holder: the process that drives it ("pid 12 on host"), None without one.
        wall_seconds: time spent, all sessions together.
        live: what its driver last said it was at; None without a driver.
    """

    folder: SearchFolder
    config: SearchConfig
    board: Leaderboard
    holder: str | None
    wall_seconds: float
    live: Live | None = None

    @property
    def state(self) -> str:
        """ "running", "finished", or "stopped" with trials left to do."""
        if self.holder:
            return "running"
        return "finished" if self.finished else "stopped"

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        counts = self.board.counts
        open_trials = counts["RUNNING"] + counts["WAITING"]
        ended = len(self.board.trials) - open_trials
        budget = self.config.budget
        limits = (
            ended >= (planned_trials(self.config) or math.inf)
            or self.wall_seconds >= (budget.wall_clock or math.inf)
            or self.board.device_seconds >= (budget.device_seconds or math.inf)
        )
        return limits and not counts["RUNNING"]

    def line(self) -> str:
        """One line for a person."""
        best = standing(self.board.front, self.board.objectives)
        shown = f"; {best}" if best else ""
        driven = f" by {self.holder}" if self.holder else ""
        again = f"; go on: topotune resume {self.config.name}" if self.state == "stopped" else ""
        return f"{self.config.name}: {self.state}{driven}; {self.board.summary}{shown}{again}"

    def to_dict(self, trials: bool = True) -> dict[str, Any]:
        """For a script; with the whole table or without."""
        data = self.board.to_dict()
        if not trials:
            data.pop("trials")
        return {
            **data,
            "best_values": list(self.board.best.values) if self.board.best else None,
            "state": self.state,
            "holder": self.holder,
            "wall_seconds": self.wall_seconds,
            "live": self.live and self.live.to_dict(),
            "folder": str(self.folder.root),
        }


def status(results_dir: Path, name: str) -> SearchStatus:
    """One search.

    Raises:
        SearchFolderError: no search has that name, or its files are damaged.
    """
    return _status(SearchFolder.open(results_dir, name))


def all_status(results_dir: Path, damaged: Callable[[str], None]) -> list[SearchStatus]:
    """All searches of a results directory, by name; one that cannot be read is named instead.

    Args:
        results_dir: where they lie.
        damaged: gets a line on each that cannot be read.
    """
    found = []
    for folder in searches(results_dir):
        try:
            found.append(_status(SearchFolder.open(results_dir, folder.name)))
        except (SearchFolderError, ResourceError) as error:
            damaged(f"{folder.name}: cannot be read: {error}")
    return found


def is_finished(folder: SearchFolder) -> bool:
    """Whether a search is known to have nothing left to do.

    Not where its study cannot be read: the driver that opens it waits for it, or mends it.
    """
    try:
        return _status(folder).finished
    except (ResourceError, SearchFolderError):
        return False


def _status(folder: SearchFolder) -> SearchStatus:
    config = folder.config()
    holder = holder_of(folder, config)
    rows, spent = read_study(folder, config)
    return SearchStatus(
        folder=folder,
        config=config,
        board=board_of(rows, config),
        holder=holder,
        wall_seconds=spent.wall_seconds,
        live=Live.read(folder.live, holder),
    )


def _no_trial(name: str, number: int) -> SearchFolderError:
    return SearchFolderError(
        f"search {name!r}: has no trial {number}. 'topotune status {name}' lists its trials"
    )


def printed(results_dir: Path, name: str, number: int) -> str:
    """What a trial has printed by now, and the traceback that it failed with.

    Raises:
        SearchFolderError: there is no such search or trial.
        ResourceError: the files cannot be read.
    """
    folder = SearchFolder.open(results_dir, name)
    fetch(results_dir, name, OUTPUT_FILE, ERROR_FILE, trial=number)
    home = folder.trial(number)
    try:
        found = {file: read(home / file) for file in (OUTPUT_FILE, ERROR_FILE)}
    except OSError as error:
        raise ResourceError(f"{home}: cannot be read: {error.strerror}") from error
    if not any(found.values()):
        if number not in [row.number for row in summaries(folder, folder.config())]:
            raise _no_trial(name, number)
        return f"trial {number} of {name} has printed nothing\n"
    lines = [found[OUTPUT_FILE]]
    if found[ERROR_FILE]:
        lines += [f"--- {home / ERROR_FILE}\n", found[ERROR_FILE]]
    return "".join(text if not text or text.endswith("\n") else f"{text}\n" for text in lines)


def serve(results_dir: Path, name: str | None, port: int, say: Callable[[str], None]) -> None:
    """Say where MLflow's pages of searches are, and serve those of the embedded store.

    What is recorded on a tracking server has its pages there: only their addresses are said.
    Otherwise this returns when it is interrupted. Figures that MLflow lacks are drawn meanwhile:
    those of the search that is named, and of all whose pages are served here.

    Args:
        results_dir: where searches lie.
        name: the search whose pages are named; None for all.
        port: preferred port; another one is taken if it is in use. 0 for any free one.
        say: gets lines on where to look.

    Raises:
        UserError: no such search, no folder that holds any, or no port.
        RunError: the server does not start, or a tracking server cannot be reached.
    """
    check_port(port)
    if name is None and (address := store_address(results_dir)) is not None:
        raise ConfigError(
            f"results address {address}",
            "has no embedded MLflow store to serve",
            "Name a search: its tracking server is shown",
        )
    shown = [SearchFolder.open(results_dir, name)] if name else searches(results_dir)
    own = embedded_artifacts(results_dir).with_name(DATABASE_FILE).is_file()
    stores: dict[str, tuple[MlflowStore, list[SearchFolder]]] = {}
    for folder in shown:
        store = open_store(folder, folder.config())
        stores.setdefault(store.label, (store, []))[1].append(folder)
    if not name and (own or not stores):
        if (central := default_server()) is not None:
            stores.setdefault(central.label, (central, []))
        if own and not any(store.artifacts for store, _ in stores.values()):
            embedded = MlflowStore.embedded(results_dir)
            stores[embedded.label] = (embedded, [])
    if not stores:
        raise SearchFolderError(
            f"{results_dir}: holds no searches and no MLflow store. Give the --results-dir where "
            "they lie"
        )
    places: dict[str, list[tuple[MlflowStore, list[SearchFolder]]]] = {}
    for store, folders in stores.values():  # one store may hold several experiments
        places.setdefault(store.tracking_uri, []).append((store, folders))
    # The embedded one comes last: serving it lasts until it is interrupted.
    for group in sorted(places.values(), key=lambda group: group[0][0].artifacts is not None):
        if not group[0][0].on_server:
            say("starting the MLflow server; this takes some seconds")
        with serve_dashboard(group[0][0], port) as dashboard:
            for store, folders in group:
                _say_pages(dashboard, store, folders, name, say)
            if dashboard.running():
                say("Ctrl-C ends it")
                dashboard.wait(partial(_send_figures, group, say))
            elif name:
                _send_figures(group, say)


def _send_figures(
    stores: Sequence[tuple[MlflowStore, list[SearchFolder]]], say: Callable[[str], None]
) -> None:
    for store, folders in stores:
        for folder in folders:
            try:
                if (parent := store.parent(folder.search_id)) is not None:
                    found = _status(folder)
                    send_figures(folder, found.board, found.finished, store, parent, say)
            except TopotuneError as error:
                say(f"warning: {folder.name}: its figures are missing: {error}")


def plot(
    results_dir: Path,
    name: str,
    trials: Sequence[int] | None,
    out: Path,
    note: Callable[[str], None],
) -> list[Path]:
    """Draw figures of a search as files.

    Args:
        results_dir: where the search lies.
        name: the search.
        trials: those whose steps and relaxations are drawn, each into a folder of its own; none
            for the search's own figures instead, None for these and all trials.
        out: the folder for the pictures.
        note: gets a line on each trial that has nothing to draw.

    Raises:
        SearchFolderError: there is no such search or trial.
        RunError: there is nothing to draw, or a record is damaged.
        ResourceError: a picture cannot be written.
    """
    found = status(results_dir, name)
    rows = {row.number: row for row in found.board.trials}
    for number in trials or ():
        if number not in rows:
            raise _no_trial(name, number)
    drawn = [] if trials else draw_search(found.board, out)
    for number in sorted(rows) if trials is None else trials:
        pictures = draw_trial(found.folder, rows[number], out / f"trial-{number:04d}")
        if not pictures:
            note(f"trial {number} ({rows[number].state}) has no steps to draw")
        drawn += pictures
    if not drawn:
        raise RunError(f"search {name!r}: nothing is recorded yet that could be drawn")
    return drawn


def _say_pages(
    dashboard: Dashboard,
    store: MlflowStore,
    folders: list[SearchFolder],
    name: str | None,
    say: Callable[[str], None],
) -> None:
    experiment, views = store.experiment_id, store.experiment_tags()
    say(f"MLflow: {experiment_page(dashboard.url, experiment)}")
    for folder in folders:
        parent = store.parent(folder.search_id)
        if parent is not None:
            say(f"{folder.name}: {run_page(dashboard.url, experiment, parent.run_id)}")
            if VIEW_TAG + folder.search_id in views:
                view = (dashboard.url, experiment, folder.search_id)
                say(f"  its trials: {experiment_page(*view)}")
                say(f"  their curves: {experiment_page(*view, charts=True)}")
            else:  # a server that takes no tags of an experiment
                goal = folder.config().objective[0]
                maximize = goal.direction == "maximize"
                page = trials_page(dashboard.url, experiment, parent.run_id, goal.metric, maximize)
                say(f"  their curves: {page}")
        elif name:
            say(f"{folder.name}: nothing is stored yet; try 'topotune sync {folder.name}'")


def sync(results_dir: Path, name: str, timeout: float) -> tuple[str, bool]:
    """Ship what is left of a search; what happened in words, and whether all is stored.

    Raises:
        SearchFolderError: no search has that name.
        ConfigError: the tracking address is of a form that MLflow does not serve, or lacks its
            password, or the time cannot be waited for.
    """
    if not 0 <= timeout < threading.TIMEOUT_MAX:
        raise ConfigError("--timeout", f"must be a number of seconds from 0 on (got {timeout:g})")
    folder = SearchFolder.open(results_dir, name)
    if store_address(results_dir) is not None:
        return _sync_store(folder, timeout)
    return _ship(folder, timeout)


def _sync_store(folder: SearchFolder, timeout: float) -> tuple[str, bool]:
    """As :func:`sync`, of a search in an object store: which no driver may have meanwhile."""
    with SearchLease(folder, folder.config(), SilentListener()) as lease:
        lease.begin()
        text, complete = _ship(folder, timeout)
        if unsaved := lease.finish(hurry=False):
            return f"{text}\n{unsaved}", False
    return text, complete


def _ship(folder: SearchFolder, timeout: float) -> tuple[str, bool]:
    store, name = open_store(folder, folder.config()), folder.name
    shipper = Shipper(folder.root, store, folder.search_id, name)
    count = shipper.close(timeout)
    text = f"{name}: {count.recorded} items recorded, {count.shipped} stored in {store.label}"
    if count.refused:
        text += f", {count.refused} refused (see refused.jsonl)"
    if count.pending:
        text += f", {count.pending} wait: {count.last_error}"
    return text, count.complete
