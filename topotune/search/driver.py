"""Start, resume or extend a search: assemble the parts, run them, and put everything away."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from topotune import __version__
from topotune.config.models import SearchConfig
from topotune.config.rules import planned_trials, remarks
from topotune.config.space import grid_size
from topotune.errors import ConfigError, LeaseLostError, RunError, TopotuneError
from topotune.files import make_folder
from topotune.records import TrialSummary
from topotune.results.leaderboard import Leaderboard
from topotune.search.code.shipped import keep_code
from topotune.search.code.source import CODE_TAG, Source, changed, check_unchanged, code_of, keep
from topotune.search.code.usercode import contents, hashes
from topotune.search.doctor.preflight import (
    MOST_AT_ONCE,
    check_writable,
    fit_resources,
    preflight,
    refuse_sqlite,
)
from topotune.search.drive.signals import Interrupts, what_is_kept
from topotune.search.live import LiveFile
from topotune.search.place.addresses import check_addresses, remembered, study_place
from topotune.search.place.folder import SearchFolder
from topotune.search.place.objects.address import store_address
from topotune.search.place.output import tidy_killed
from topotune.search.place.search_lease import SearchLease, check_stores
from topotune.search.place.shipping import look_first
from topotune.search.ray.session import RaySession
from topotune.search.ray.watchdog import GUARD_FILE
from topotune.search.status import is_finished
from topotune.search.study.database import check_study
from topotune.search.study.patience import Patience
from topotune.search.view import BEGUN, Listener, SafeListener
from topotune.tracking.entries import RUNNING

if TYPE_CHECKING:
    from topotune.search.drive.book import Book
    from topotune.search.place.shipping import Shipping
    from topotune.search.ray.sharing import Sharing


FIRST_SHARE_SECONDS = 10.0
"""How long a search waits to hear its share before it takes what is free."""


@dataclass(frozen=True)
class SearchReport:
    """How a session of a search ended.

    Attributes:
        folder: the search's folder.
        config: the search.
        board: the leaderboard.
        finished: nothing is left to do within the budget.
        reason: why it ended early, or with fewer trials than its budget has; empty otherwise.
        tracking: one line: what was recorded, what is stored, what still waits.
    """

    folder: SearchFolder
    config: SearchConfig
    board: Leaderboard
    finished: bool
    reason: str
    tracking: str


def start(
    config: SearchConfig,
    source: str,
    results_dir: Path,
    listener: Listener,
    address: str = "local",
    code: Path | None = None,
) -> SearchReport:
    """Run a new search to its end.

    Args:
        config: the search.
        source: the search file's text, kept with the results.
        results_dir: where the search's folder is made.
        listener: who watches.
        address: the Ray cluster; "local" starts one of its own.
        code: a folder with the code that was shipped for it, kept beside the results.

    Raises:
        UserError: the search cannot start as it is; nothing is written then.
        RunError: it was running and had to end; what it has done is kept.
    """
    listener = SafeListener(listener)
    with Interrupts() as interrupts:
        interrupts.kept = what_is_kept(config.name, begun=False)
        check_addresses(config, results_dir)
        config = remembered(config)
        if (store := store_address(results_dir)) is not None:
            check_stores(store, config)
        folder = SearchFolder.check_free(results_dir, config)
        check_writable(results_dir)
        look_first(folder, config, listener.note)
        check_study(folder, config, listener.note)
        for remark in remarks(config):
            listener.note(f"note: {remark}")
        own = Source.here(config, Path.cwd())  # before any of it is imported
        listener.note("checking the search: task, model and method at the ends of every range")
        preflight(config, listener.note)
        with RaySession(address, listener, interrupts) as ray_session:
            workers = _workers(config, ray_session, own)
            make_folder(folder.root)
            with SearchLease(folder, config, listener) as lease:
                # Looks again: another command may have begun the same search meanwhile.
                folder = SearchFolder.create(results_dir, config, source)
                interrupts.kept = what_is_kept(config.name, begun=True)
                if code is not None:
                    keep_code(code, folder.code)
                return _run(folder, config, listener, interrupts, lease, workers)


def resume(
    results_dir: Path,
    name: str,
    listener: Listener,
    extra_trials: int = 0,
    address: str = "local",
    changed_code: bool = False,
    code: Path | None = None,
) -> SearchReport:
    """Continue a search where it was left, with ``extra_trials`` more than it had.

    Args:
        results_dir: where the search's folder lies.
        name: the search.
        listener: who watches.
        extra_trials: how many trials more.
        address: the Ray cluster; "local" starts one of its own.
        changed_code: go on also where the user's modules are not what they were.
        code: a folder with code that was shipped in place of what is kept beside the results.

    Raises:
        UserError: there is no such search, another process drives it, or its code has changed.
        RunError: as :func:`start`.
    """
    listener = SafeListener(listener)
    folder = SearchFolder.open(results_dir, name)
    with Interrupts() as interrupts, SearchLease(folder, folder.config(), listener) as lease:
        config = folder.config()
        interrupts.kept = what_is_kept(name, begun=True)
        check_addresses(config, results_dir)
        check_writable(results_dir)
        if extra_trials:
            before, config = config, extended(config, extra_trials)
            if config.budget.trials != (planned_trials(before) or 0) + extra_trials:
                listener.note(f"the grid has {config.budget.trials} points: no more are added")
        look_first(folder, config, listener.note)
        if not extra_trials and is_finished(folder):
            listener.note(f"{name}: finished, nothing is left to do")
            return _run(folder, config, listener, interrupts, lease, None)
        source = Source.here(config, code or code_of(folder))
        if not changed_code:
            check_unchanged(folder, source)
        preflight(config, listener.note)
        with RaySession(address, listener, interrupts) as ray_session:
            workers = _workers(config, ray_session, source)
            folder.save(config)
            if code is not None:
                keep_code(code, folder.code)
            return _run(folder, config, listener, interrupts, lease, workers)


@dataclass(frozen=True)
class _Workers:
    """What a session trains with.

    Attributes:
        ray: the connection to Ray.
        gpus: GPUs a trial.
        concurrency: trials at once.
        source: the code that they run.
    """

    ray: RaySession
    gpus: float
    concurrency: int
    source: Source


def _workers(config: SearchConfig, ray_session: RaySession, source: Source) -> _Workers:
    """Fit a search to the cluster.

    Raises:
        UserError: its stores or resources do not fit there.
    """
    refuse_sqlite(config, ray_session.hosts(), ray_session.cluster().grows)
    gpus, concurrency = fit_resources(config, ray_session.cluster())
    return _Workers(ray_session, gpus, concurrency, source)


def _sharing(folder: SearchFolder, book: Book, ray_session: RaySession, gpus: float) -> Sharing:
    """The search's part in sharing a cluster with others, its first share known if it came soon."""
    from topotune.search.ray.cluster import UNLIMITED, needs_of
    from topotune.search.ray.sharing import Sharing
    from topotune.search.share import Demand

    search, config = folder.search_id, book.config
    needs = needs_of(config, gpus)

    def demand() -> Demand:
        left = book.store.left
        open_trials = math.inf if left is None else left + len(book.live)
        # Nothing may fit now, where a node is gone: then it waits for one.
        fits = min(ray_session.cluster().most_slots(needs), MOST_AT_ONCE)
        limit = config.resources.concurrency
        wanted = int(min(fits if limit == "auto" else min(limit, fits), open_trials))
        held = len(book.holding)
        return Demand(search, config.name, config.resources.priority, needs, wanted, held)

    def capacity() -> dict[str, float]:
        cluster = ray_session.cluster()
        return {name: min(cluster.most(name), UNLIMITED) for name in needs}

    sharing = Sharing(search, demand, capacity)
    sharing.wait(FIRST_SHARE_SECONDS)
    return sharing


def _train(
    folder: SearchFolder,
    book: Book,
    listener: Listener,
    lease: SearchLease,
    shipping: Shipping,
    live: LiveFile,
    workers: _Workers,
) -> TopotuneError | None:
    """Let Ray run what the book hands out; the error that ended it early, if one did."""
    from topotune.search.ray.execute import execute
    from topotune.search.ray.pulse import Pulse

    config, gpus, source, failure = book.config, workers.gpus, workers.source, None
    sharing = None if workers.ray.local else _sharing(folder, book, workers.ray, gpus)
    pulse = Pulse(book, listener, workers.ray, shipping, config, gpus, live, sharing)
    note, files, most = listener.note, lease.files, workers.concurrency
    try:
        execute(folder, config, book, pulse, gpus, note, source, most, files)
    except TopotuneError as error:
        failure = error
    if changes := changed(source.hashes, hashes(contents(source.files))):
        listener.note(
            f"warning: edited while the search ran: {', '.join(changes)}. Trials whose worker "
            f"started after that ran the new code; the tag {CODE_TAG} tells them apart"
        )
    if sharing is not None:
        sharing.close()  # other searches take the devices while this one saves and sends
    return failure


def extended(config: SearchConfig, trials: int) -> SearchConfig:
    """The search with a larger budget of trials; limits of time grow in proportion.

    A grid gets no more trials than it has points that were not to be tried before.

    Raises:
        ConfigError: the search has no limit of trials to extend, or is a grid whose points were
            all to be tried.
    """
    before = planned_trials(config)
    if before is None:
        raise ConfigError("budget.trials", "this search has no limit of trials to extend")
    after = before + trials
    if config.sampler.name == "grid":
        points = grid_size(config.space)
        if before == points:
            raise ConfigError(
                "sampler",
                f"all {points} points of the grid belong to this search; it cannot be extended",
                "Give a parameter more choices or a smaller step in a search of another --name",
            )
        after = min(after, points)
    factor = after / before
    scaled = {
        name: None if value is None else value * factor
        for name in ("wall_clock", "device_seconds")
        if (value := getattr(config.budget, name)) is not None
    }
    return config.with_budget(trials=after, **scaled)


def _run(
    folder: SearchFolder,
    config: SearchConfig,
    listener: Listener,
    interrupts: Interrupts,
    lease: SearchLease,
    workers: _Workers | None,
) -> SearchReport:
    """One session of a search; without workers, of one that is finished: what an earlier session
    did not come to record is recorded, and sent.

    The order of the steps is part of the guarantees; the comments say why.
    """
    from topotune.search.drive.book import Book
    from topotune.search.drive.recorder import Recorder, board_of
    from topotune.search.drive.retention import Retention
    from topotune.search.place.shipping import Shipping
    from topotune.search.study.ledger import Ledger
    from topotune.search.study.store import StudyStore

    gpus = workers.gpus if workers else 0.0
    # All that writes asks the lease before each change: a driver that was suspended while another
    # took the search over finds that out before it damages anything.
    patience = Patience(study_place(folder, config), listener.note)
    store = StudyStore(folder, config, gpus, patience, lease.check)
    ledger = Ledger(store.spent(), store.keep_spent, gpus or 1.0)
    recorder = Recorder(folder, config, lease.check, lease.files, lambda: store.rows(ledger.trials))
    # The code is on record before any of it runs.
    kept = keep(folder, workers.source) if workers else []
    before = store.rows(ledger.trials)
    if workers:
        listener.note(f"{config.name}: {BEGUN}, {workers.concurrency} trials at once")

    def ended(row: TrialSummary) -> None:
        recorder.ended(row)
        retention.ended(row)
        listener.ended(row)

    book = Book(config, store, ledger, workers.concurrency if workers else 1, ended, before)
    book.record = recorder.progress
    # What is here is safe elsewhere, too, before it changes; then a signal may drain the search.
    lease.begin(lambda: list(book.live))
    interrupts.drain(book)
    patience.fence = lease.check
    patience.stopping = lambda: book.stopping
    patience.waiting = lambda: ledger.charge(book.holding)  # workers hold devices meanwhile
    with Shipping(folder, config, listener) as shipping:
        recorder.start(
            {
                "topotune.version": __version__,
                "topotune.task": config.task.name,
                "topotune.method": config.method,
                "topotune.folder": str(folder.root),
                **(workers.source.search_tags if workers else {}),
            },
            kept,
        )
        recorder.recover(before)
        # Checkpoints that are not kept go after what was recorded of their trials is made whole.
        retention = Retention(folder, config, before, lease.files)
        del before  # of thousands of trials, for days
        live = LiveFile(folder.live, lease.check)
        failure = (
            _train(folder, book, listener, lease, shipping, live, workers) if workers else None
        )
        failure = book.fatal or failure
        # The search is another driver's from here on: not one more byte is written.
        if isinstance(failure, LeaseLostError):
            recorder.drop()
            raise failure
        live.remove()
        rows: list[TrialSummary] = []
        reason = str(failure) if failure else book.stopping or book.short_of_trials()
        done = not (failure or book.stopping or book.live or book.left_running)
        outcome = "COMPLETE" if done else ("FAILED" if failure else "INTERRUPTED")
        listener.tick(book.view("done", tracking=shipping.line()))
        # The leaderboard is made of the study when nothing changes it any more, and closes the
        # records; only then is there nothing left that a signal would have to wait for.
        try:
            ledger.save()
            rows = store.rows(ledger.trials)  # with the driver's patience, not a reader's
            board = board_of(rows, config)
            recorder.close(board, outcome, reason)
        except TopotuneError as error:
            # What ended the search usually hurts here, too; the first cause is the one to tell.
            failure = failure or error
            recorder.drop()
        interrupts.drain(None)  # all is saved; what is not sent now is sent by a sync
        hurry = bool(book.stopping or failure)
        # Files of killed workers are tidied before the last ones are saved elsewhere.
        tracking = shipping.close(hurry)
        untidy = {folder.trial(row.number) for row in rows if row.state == RUNNING}
        untidy |= {note.parent for note in folder.root.glob(f"trials/*/{GUARD_FILE}")}
        tidy_killed(untidy)
        unsaved = lease.finish(hurry)
        try:
            store.close()
        except TopotuneError as error:
            failure = failure or error
    if unsaved:
        failure = failure or RunError(unsaved)
    if failure:
        raise failure
    return SearchReport(folder, config, board, done, reason, tracking)
