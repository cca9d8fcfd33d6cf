"""Exports of trials whose checkpoints are whole, damaged, short or gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.search_cases import Desk, make_config
from tests.train_cases import BLOBS
from topotune.cli.main import app
from topotune.config.budget import Limits
from topotune.search.drive.book import Progress
from topotune.search.export import export_top
from topotune.search.ray.worker import TrialActor, trial_config
from topotune.search.status import status
from topotune.search.study.store import Handout
from topotune.train.checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE


def trained(results: Path, **changes: Any) -> Desk:
    """A search, of one trial if nothing else is said, trained as its workers train it."""
    plain = {"task": BLOBS, "budget": {"trials": 1, "epochs": 3}, "overhead": {"blocks": 0}}
    desk = Desk(results, make_config(**{**plain, **changes}))
    while isinstance(handout := desk.book.next(), Handout):
        actor = TrialActor.__new__(TrialActor)
        place = desk.folder.root
        actor.setup(trial_config(handout.number, handout.spec, place, Limits(), Path.cwd()))
        while desk.book.progress(handout.number, Progress.from_json(actor.step()["payload"])):
            pass
        actor.cleanup()
        row = desk.book.end(handout.number)
        assert row is not None
        assert row.state == "COMPLETE"
    desk.store.close()
    return desk


def files(folder: Path) -> dict[str, bytes]:
    """The content of a trial's folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def damaged(folder: Path) -> None:
    for name in (CHECKPOINT_FILE, PREVIOUS_FILE):
        (folder / name).write_bytes(b"nonsense")


def short(folder: Path) -> None:
    (folder / CHECKPOINT_FILE).write_bytes(b"nonsense")


def gone(folder: Path) -> None:
    (folder / CHECKPOINT_FILE).unlink()
    (folder / PREVIOUS_FILE).unlink()


def whole(folder: Path) -> None:
    """As its worker left it."""


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (whole, None),
        (damaged, "does not begin like a checkpoint of this version, so it is trained again"),
        (short, "its checkpoint holds 2 of 3 epochs, so it is trained again"),
        (gone, "its checkpoint is gone, so it is trained again"),
    ],
)
def test_an_export_leaves_the_searchs_folder_as_it_is(
    harm: Callable[[Path], None], said: str | None, tmp_path: Path
) -> None:
    desk = trained(tmp_path / "results")
    home = desk.folder.trial(0)
    first = tmp_path / "first"
    export_top(desk.folder, 1, first, note=lambda text: None)
    harm(home)
    before = files(home)
    notes: list[str] = []
    (again,) = export_top(desk.folder, 1, tmp_path / "again", note=notes.append)
    assert files(home) == before
    assert len(notes) == (1 if said is None else 2)
    assert said is None or said in notes[0]
    assert "delete" not in " ".join(notes)
    weights = again.paths.weights
    assert weights.read_bytes() == (first / weights.relative_to(tmp_path / "again")).read_bytes()


def test_the_whole_front_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goals = [
        {"metric": "val_accuracy", "direction": "maximize"},
        {"metric": "train_loss", "direction": "minimize"},
    ]
    desk = trained(tmp_path / "results", objective=goals, budget={"trials": 5, "epochs": 2})
    front = [trial.number for trial in status(tmp_path / "results", "demo").board.front]
    exported = export_top(desk.folder, None, tmp_path / "all", note=lambda text: None)
    assert [one.number for one in exported] == front
    monkeypatch.chdir(tmp_path)
    command = ["export", "demo", "--results-dir", str(tmp_path / "results"), "--json"]
    done = CliRunner().invoke(app, [*command, "--front"])
    assert done.exit_code == 0, done.output
    assert [one["trial"] for one in json.loads(done.stdout)] == front
    made = sorted(path.name for path in (tmp_path / "topotune-exports" / "demo").iterdir())
    assert made == [f"rank-{i}-trial-{n:04d}" for i, n in enumerate(front, start=1)]
    both = CliRunner().invoke(app, [*command, "--front", "--top", "2"])
    assert "--front: exports the whole front" in str(both.exception)
