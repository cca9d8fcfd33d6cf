"""Exports of trials whose checkpoints are whole, damaged, short or gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.search_cases import Desk, make_config
from tests.train_cases import BLOBS
from topotune.config_budget import Limits
from topotune.search.book import Progress
from topotune.search.exports import export_top
from topotune.search.study import Handout
from topotune.search.worker import TrialActor, trial_config
from topotune.train.checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE


def trained(results: Path) -> Desk:
    """A search of one trial, trained as its worker trains it."""
    config = make_config(
        task=BLOBS, budget={"trials": 1, "epochs": 3}, overhead={"blocks": 0}, fixed={}
    )
    desk = Desk(results, config)
    handout = desk.book.next()
    assert isinstance(handout, Handout)
    actor = TrialActor.__new__(TrialActor)
    actor.setup(trial_config(handout.number, handout.spec, desk.folder.root, Limits(), Path.cwd()))
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
