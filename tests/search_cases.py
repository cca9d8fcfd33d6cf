"""A search without Ray: a config, and a stand-in worker that reports known curves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from topotune.config.models import SearchConfig
from topotune.records import EpochReport, Outcome, TrialSpec, TrialSummary
from topotune.search.drive.book import Book, Progress, Turn
from topotune.search.place.folder import STUDY_COPY, STUDY_FILE, SearchFolder
from topotune.search.study.journal import Journal
from topotune.search.study.ledger import Ledger
from topotune.search.study.rows import summaries
from topotune.search.study.store import Handout, StudyStore


def make_config(**changes: Any) -> SearchConfig:
    """A small search over lr of a task that is never built here."""
    data: dict[str, Any] = {
        "name": "demo",
        "task": "digits",
        "method": "adam",
        "space": {"lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}},
        "objective": {"metric": "val_accuracy", "direction": "maximize"},
        "budget": {"trials": 6, "epochs": 4},
        "sampler": {"name": "tpe", "startup_trials": 2},
        "pruner": "none",
    }
    return SearchConfig.model_validate({**data, **changes})


def accuracy(spec: TrialSpec, epoch: int) -> float:
    """A known curve: best at lr 0.01, better with every epoch."""
    distance = abs(math.log10(float(spec.params["lr"])) + 2)  # type: ignore[arg-type]
    return 1.0 - 0.2 * distance - 0.1 / epoch


def study_files(folder: SearchFolder) -> tuple[Path, Path]:
    """The study's file and its copy."""
    return folder.root / STUDY_FILE, folder.root / STUDY_COPY


def edit_study(folder: SearchFolder, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the records of a study, checksums included; one whose change is False is left out."""
    files = study_files(folder)
    records = [json.loads(line) for line in files[0].read_bytes().splitlines()]
    journal = Journal(files, anew=True)
    for record in records:
        del record["crc"]
        if change(record) is not False:
            journal.append_logs([record])
    journal.commit(force=True)


def edit_note(folder: SearchFolder, number: int, key: str, value: object) -> None:
    """Change a trial's note in its study, by :func:`edit_study`."""

    def change(record: dict[str, Any]) -> None:
        for kind in ("user_attr", "system_attr"):
            if record.get("trial_id") == number and key in record.get(kind, ()):
                record[kind] = {key: value}

    edit_study(folder, change)


def report(spec: TrialSpec, epoch: int, **metrics: float) -> EpochReport:
    """The report that the known curve gives after an epoch."""
    values = {"val_accuracy": accuracy(spec, epoch), "overhead_vs_adam": 1.1, **metrics}
    return EpochReport(epoch, epoch * 10, values, 0.1, 1_700_000_000_000 + epoch)


class Desk:
    """A search's folder, study and book, as the driver would open them."""

    def __init__(self, results: Path, config: SearchConfig, concurrency: int = 1) -> None:
        self.config = config
        if (results / config.name / "search.json").exists():
            self.folder = SearchFolder.open(results, config.name)
        else:
            self.folder = SearchFolder.create(results, config, "")
        self.store = StudyStore(self.folder, config)
        self.ledger = Ledger(self.store.spent(), self.store.keep_spent)
        self.ended: list[TrialSummary] = []
        before = summaries(self.folder, config)
        self.book = Book(config, self.store, self.ledger, concurrency, self.ended.append, before)

    def rows(self) -> list[TrialSummary]:
        """All trials as the study on disk has them."""
        return summaries(self.folder, self.config)

    def stored(self) -> list[FrozenTrial]:
        """All trials as Optuna itself reads them from the file."""
        storage = JournalStorage(JournalFileBackend(str(self.folder.root / STUDY_FILE)))
        return optuna.load_study(study_name=self.config.name, storage=storage).get_trials()

    def train(
        self, handout: Handout, make: Callable[[TrialSpec, int], EpochReport] = report
    ) -> TrialSummary | None:
        """Work on a handout until it ends or is stopped."""
        spec = handout.spec
        for epoch in range(1, spec.epochs + 1):
            outcome = Outcome.COMPLETE if epoch == spec.epochs else None
            if not self.book.progress(
                handout.number, Progress((make(spec, epoch),), outcome=outcome)
            ):
                break
        return self.book.end(handout.number)

    def run(self, make: Callable[[TrialSpec, int], EpochReport] = report) -> None:
        """Work until nothing is handed out any more."""
        while isinstance(turn := self.book.next(), Handout):
            self.train(turn, make)
        assert turn is Turn.END
