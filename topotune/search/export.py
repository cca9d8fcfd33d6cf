"""Export the best trials of a search: choose, take or retrain the weights, write, verify."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topotune.config.file import parse_spec
from topotune.errors import CheckpointError, RunError, TrackingError
from topotune.records import (
    DATA_TAG,
    ROWS_TAG,
    EpochReport,
    OverheadOptions,
    TrialResult,
    TrialSpec,
)
from topotune.repository import COMMIT_TAG, own_version
from topotune.results.card import Provenance
from topotune.results.export import ExportPaths, export_config
from topotune.results.verify import Verification, verify
from topotune.search.code.source import (
    CODE_TAG,
    GIT_TAGS,
    Source,
    code_differences,
    other_differences,
    trial_starts,
)
from topotune.search.drive.recorder import leaderboard
from topotune.search.place.addresses import experiment
from topotune.search.place.folder import SearchFolder
from topotune.search.place.objects.pull import fetch
from topotune.search.place.shipping import open_store
from topotune.tracking.outbox import OUTBOX_FILE
from topotune.tracking.registry import register_model
from topotune.train.checkpoint import CHECKPOINT_FILE, CheckpointStore

GPU_TOLERANCE = 5e-3
"""Accepted difference of a verified metric off the CPU, where kernels sum in varying order."""


_SOURCE = (CODE_TAG, *GIT_TAGS, COMMIT_TAG, DATA_TAG, ROWS_TAG, "kernels")
"""What an export says of where its trial came from."""


@dataclass(frozen=True)
class Exported:
    """One exported trial.

    Attributes:
        number: the trial.
        paths: its files.
        test: metrics on the test split, opened now for the first time.
        verification: the second training's comparison, if asked for.
        version: its version in the model registry, if asked for.
    """

    number: int
    paths: ExportPaths
    test: dict[str, float]
    verification: Verification | None
    version: str | None


def export_top(
    folder: SearchFolder,
    count: int | None,
    out: Path,
    *,
    check: bool = False,
    register: str | None = None,
    alias: str = "best",
    force: bool = False,
    note: Callable[[str], None],
) -> list[Exported]:
    """Export the best ``count`` trials; the first of them also goes into the registry.

    Args:
        folder: the search.
        count: how many, fewer if fewer finished; None for every trial of the Pareto front.
        out: folder that gets a sub-folder a trial.
        check: train each config again and compare the recorded objectives exactly.
        register: name in MLflow's model registry for the best one.
        alias: alias of that version.
        force: replace earlier, different exports.
        note: gets what happens, one line at a time.

    Raises:
        RunError: no trial has finished within the constraints.
        VerificationError: a config did not reproduce its metric; what was written stays.
        TrackingError: the registry refused.
    """
    config = folder.config()
    board = leaderboard(folder, config)
    best = board.front if count is None else board.top(count)
    if not best:
        raise RunError(
            f"{folder.root}: no trial finished within the constraints, so there is nothing to "
            f"export ({board.summary})"
        )
    exported = []
    fetch(folder.root.parent, folder.name, "sources/", OUTBOX_FILE)
    now = Source.here(config, Path.cwd())
    for rank, row in enumerate(best, start=1):
        spec = parse_spec(row.spec, f"{folder.root}: trial {row.number}", {})
        fetch(folder.root.parent, folder.name, CHECKPOINT_FILE, trial=row.number)
        starts = trial_starts(folder, row.number)
        differs = code_differences(folder, starts, now.hashes)
        if differs:
            note(f"warning: trial {row.number} ran other code than there is now: {differs[0]}")
        weights, history = _weights(spec, folder.trial(row.number), note)
        from topotune.train.weights import evaluate_test

        test = evaluate_test(spec, weights)
        paths = export_config(
            row,
            rank,
            objectives=config.directions,
            out=out,
            weights=weights,
            provenance=_provenance(folder, spec, len(board.trials), starts),
            history=history,
            test_metrics=test,
            force=force,
        )
        note(f"rank {rank}: trial {row.number} -> {paths.folder}")
        verification = None
        if check:
            note(f"rank {rank}: training trial {row.number} again to verify it")
            # A measured cost never repeats exactly; what the training itself reached does.
            metric = next(
                (o.metric for o in config.objective if not o.metric.startswith("overhead_")),
                "val_loss",
            )
            verification = _verify(spec, dict(row.metrics), metric, differs, starts)
        exported.append(Exported(row.number, paths, test, verification, None))
    if register is not None:
        exported[0] = _register(folder, exported[0], register, alias)
    return exported


def _weights(
    spec: TrialSpec, folder: Path, note: Callable[[str], None]
) -> tuple[dict[str, Any], tuple[EpochReport, ...]]:
    """Weights and history of a trial: from its checkpoint, or trained again where that does not
    hold the whole training. The search's own folder stays as it is: it may be driven meanwhile."""
    from topotune.train.trial import open_trial

    plain = _without_overhead(spec)
    run, fault = None, _fault(plain, folder)
    if not fault:
        try:
            run = open_trial(plain, folder=folder)
        except CheckpointError as error:  # the code that builds the trial has changed
            fault = _in_short(error)
    if run is None:
        note(f"trial {folder.name}: {fault}, so it is trained again; its folder stays as it is")
        run = open_trial(plain)
    for _ in run.reports():
        pass
    return run.weights(), run.history


def _fault(spec: TrialSpec, folder: Path) -> str:
    """Why a trial's checkpoint does not hold its whole training; empty where it does."""
    try:
        state = CheckpointStore(folder, spec).load()
    except CheckpointError as error:
        return _in_short(error)
    if state is None:
        return "its checkpoint is gone"
    history = state.get("history")
    kept = len(history) if isinstance(history, list) else 0
    return "" if kept >= spec.epochs else f"its checkpoint holds {kept} of {spec.epochs} epochs"


def _in_short(error: CheckpointError) -> str:
    """Without the fix, which is for those who train on."""
    return str(error).partition(". ")[0]


def _without_overhead(spec: TrialSpec) -> TrialSpec:
    return dataclasses.replace(spec, overhead=OverheadOptions(blocks=0))


def _verify(
    spec: TrialSpec,
    recorded: dict[str, float],
    metric: str,
    differs: list[str],
    starts: list[dict[str, str]],
) -> Verification:
    from topotune.train.process import resolve_device
    from topotune.train.trial import open_trial

    run = open_trial(_without_overhead(spec))
    again: TrialResult = run.complete()
    found = run.record.start.tags
    differs = [*differs, *(other_differences(starts[-1], found) if starts else [])]
    # What ran on a GPU, as "auto" may have meant there, is not to be had bit for bit on a CPU.
    where = f"auto, {resolve_device('auto')}" if spec.device == "auto" else spec.device
    return verify(recorded, again.metrics, metric, where, tolerance=GPU_TOLERANCE, differs=differs)


def _provenance(
    folder: SearchFolder, spec: TrialSpec, trials: int, starts: list[dict[str, str]]
) -> Provenance:
    from topotune.train.process import provenance, resolve_device

    found = provenance(resolve_device(spec.device))
    packages = {
        name.removeprefix("version."): value
        for name, value in found.items()
        if name.startswith("version.") and name != "version.topotune"
    }
    return Provenance(
        search=folder.name,
        search_id=folder.search_id,
        experiment=experiment(folder.config()),
        trials=trials,
        code_version=own_version(),
        packages=packages,
        device=f"{found['device']} ({found['device_name']}, {spec.threads} threads)",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        source={name: starts[-1][name] for name in _SOURCE if name in starts[-1]} if starts else {},
    )


def _register(folder: SearchFolder, best: Exported, name: str, alias: str) -> Exported:
    store = open_store(folder, folder.config())
    runs = [r for r in store.runs(folder.search_id, best.number) if not r.deleted]
    if not runs:
        raise TrackingError(
            f"trial {best.number} has no run in {store.label} yet. Run 'topotune sync "
            f"{folder.name}' first"
        )
    paths = best.paths
    files = [paths.config, paths.metrics, paths.provenance, paths.weights, paths.card]
    version = register_model(store, runs[0].run_id, files, name, alias)
    return dataclasses.replace(best, version=version)
