"""What must hold after every fault: nothing lost, nothing twice, everything readable."""

from __future__ import annotations

import fcntl
import json
import uuid
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.site import NAME, Site
from tests.reconcile import StoredCheck, reconcile
from topotune.records import EpochReport, Outcome, TrialSpec
from topotune.search.place.folder import SearchFolder
from topotune.search.place.shipping import open_store
from topotune.tracking.shipper import Shipper
from topotune.train.checkpoint import CHECKPOINT_FILE, CheckpointStore
from topotune.train.trial import TIMING_METRICS


def audit(site: Site, trials: int = 4, undisturbed: bool = True, kills: int | None = None) -> str:
    """Check a search that has come to its end; what was counted, in words.

    Args:
        site: where it lies.
        trials: how many trials it must have.
        undisturbed: compare its trials with those of the same search without a fault, to be the
            same in all but timings. For one trial at a time, where the fault changes no value.
        kills: how often the one trial at work was interrupted, each of which may cost the epoch
            that it was in and no more; None for not counted.
    """
    status = site.status()
    rows = status["trials"]
    assert status["state"] == "finished", f"state {status['state']}: {status['counts']}"
    numbers = sorted(row["number"] for row in rows)
    assert numbers == list(range(trials)), f"trials {numbers}, expected 0 to {trials - 1}"
    ended = {outcome.value for outcome in Outcome}
    assert {row["state"] for row in rows} <= ended, f"not ended: {status['counts']}"
    epochs = sum(_check_epochs(row, site.epochs(row["number"])) for row in rows)
    if kills is not None:
        trained = site.trained()
        assert epochs <= trained <= epochs + kills, (
            f"{trained} epochs were trained for {epochs}, with {kills} interruptions"
        )
    _check_checkpoints(site.kept, rows)
    stored = _check_mlflow(site.kept, trials)
    if undisturbed:
        _compare(rows, reference(site))
    points = f"{stored.recorded} points recorded, {stored.stored} stored"
    return f"{trials} trials, {epochs} epochs, {points}"


def reference(site: Site) -> list[dict[str, Any]]:
    """The trials of this site's search file without any fault; trained once, then remembered."""
    with (site.shared / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # rows that run beside this one may want the same
        return _reference(site)


def known_reference(site: Site) -> Path | None:
    """The kept search file of the undisturbed run, its results in a folder beside it; None before
    :func:`reference` has run."""
    text = site.file.read_text(encoding="utf-8")
    files = site.shared.glob("*.yaml")
    return next((file for file in files if file.read_text(encoding="utf-8") == text), None)


def _reference(site: Site) -> list[dict[str, Any]]:
    if (known := known_reference(site)) is not None:
        found: list[dict[str, Any]] = json.loads(known.with_suffix(".json").read_text())
        return found
    text = site.file.read_text(encoding="utf-8")
    with Site(site.shared / f"calm-{uuid.uuid4().hex[:8]}", site.shared) as calm:
        calm.file.write_text(text, encoding="utf-8")
        calm.run("search", calm.file)
        rows: list[dict[str, Any]] = calm.status()["trials"]
    target = site.shared / f"{calm.folder.name}.yaml"
    target.with_suffix(".json").write_text(json.dumps(rows), encoding="utf-8")
    target.write_text(text, encoding="utf-8")
    return rows


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """A trial's row without what depends on the clock."""
    kept = {key: value for key, value in row.items() if key not in ("device_seconds", "rank")}
    timings = TIMING_METRICS | {"adam_step_ms"}
    kept["metrics"] = {
        name: value
        for name, value in row["metrics"].items()
        if name not in timings and "overhead" not in name
    }
    return kept


def _check_epochs(row: dict[str, Any], reports: list[EpochReport]) -> int:
    """Each epoch is recorded once, none is left out, and the study counts the same."""
    place = f"trial {row['number']}"
    numbers = [report.epoch for report in reports]
    repeated = [epoch for epoch, count in Counter(numbers).items() if count > 1]
    assert not repeated, f"{place}: epochs {repeated} are recorded twice"
    assert numbers == list(range(1, len(numbers) + 1)), f"{place}: recorded epochs {numbers}"
    assert len(numbers) == row["epochs"], f"{place}: {len(numbers)} recorded, {row['epochs']} told"
    return len(numbers)


def _check_checkpoints(folder: SearchFolder, rows: list[dict[str, Any]]) -> None:
    """Every checkpoint that is kept can be read, and is that of the trial's last epoch."""
    kept = 0
    for row in rows:
        if not (folder.trial(row["number"]) / CHECKPOINT_FILE).exists():
            continue
        spec = TrialSpec.from_dict(row["spec"])
        state = CheckpointStore(folder.trial(row["number"]), spec).load()
        epochs = 0 if state is None else len(state["history"])
        assert epochs == row["epochs"], f"trial {row['number']}: checkpoint of epoch {epochs}"
        kept += 1
    complete = sum(row["state"] == Outcome.COMPLETE for row in rows)
    wanted = min(complete, folder.config().keep_checkpoints)
    assert kept == wanted, f"{kept} checkpoints are kept, expected {wanted}"


def _check_mlflow(folder: SearchFolder, trials: int) -> StoredCheck:
    """One run a trial and one for the search, all ended, with every recorded point."""
    store = open_store(folder, folder.config())
    shipper = Shipper(folder.root, store, folder.search_id, NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's libraries
        shipper.close(30)
        checked = reconcile(folder.root, store, folder.search_id)
        runs = [run for run in store.runs(folder.search_id) if not run.deleted]
    counts = Counter(run.trial for run in runs)
    assert counts == Counter([None, *range(trials)]), f"MLflow's runs: {dict(counts)}"
    open_runs = [run.trial for run in runs if run.status == "RUNNING"]
    assert not open_runs, f"still RUNNING in MLflow: {open_runs}"
    assert checked.complete, f"MLflow lacks or has too much: {checked}"
    return checked


def _compare(rows: list[dict[str, Any]], calm: list[dict[str, Any]]) -> None:
    here = {row["number"]: untimed(row) for row in rows}
    for row in calm:
        mine, theirs = here[row["number"]], untimed(row)
        differing = sorted(key for key in theirs if mine.get(key) != theirs[key])
        assert not differing, (
            f"trial {row['number']} differs from the undisturbed run's in {differing}"
        )
    order, wanted = [row["number"] for row in rows], [row["number"] for row in calm]
    assert order == wanted, f"leaderboard {order}, undisturbed {wanted}"
