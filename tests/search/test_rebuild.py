"""A study that is damaged, lost or set back is built again, trial by trial, from the records."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from tests.search_cases import Desk, accuracy, make_config, report
from topotune.errors import ResourceError, SearchFolderError
from topotune.records import EpochReport, Outcome, TrialSpec
from topotune.search.drive.book import Progress
from topotune.search.status import is_finished
from topotune.search.study.ledger import Ledger, read_ledger
from topotune.search.study.patience import Patience
from topotune.search.study.rows import summaries
from topotune.search.study.store import Handout, StudyStore
from topotune.search.study.trialfile import (
    PREVIOUS_TRIAL_FILE,
    TRIAL_FILE,
    TrialCopy,
    read_copies,
    write_copy,
)
from topotune.tracking.lines import encode


def study_file(desk: Desk) -> Path:
    return desk.folder.root / "study.db"


def reopened(desk: Desk) -> tuple[StudyStore, list[str]]:
    """The study as a resume opens it, and what was noted."""
    desk.store.close()
    notes: list[str] = []
    patience = Patience(str(study_file(desk)), notes.append)
    return StudyStore(desk.folder, desk.config, patience=patience), notes


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scrambled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096 : len(content) - 4096] = bytes(i * 37 % 251 for i in range(len(content) - 8192))
    path.write_bytes(content)


def flipped(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"101.0", b"191.0"))


def torn_json(path: Path) -> None:
    path.write_text('{"wall_seconds": 7.5, "trials": {"0": "')


def not_a_database(path: Path) -> None:
    path.write_bytes(b"\xff" * 9000)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE studies (unlike)")
    connection.close()


def half_foreign(path: Path) -> None:
    """Tables that Optuna cannot even open."""
    path.unlink()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE version_info (unlike)")
    connection.close()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncated,
    "scrambled": scrambled,
    "empty": empty,
    "not a database": not_a_database,
    "another database": foreign,
    "tables of others": half_foreign,
    "missing": Path.unlink,
}


def half_done(folder: Path, **changes: Any) -> Desk:
    """A search with trials that ended in several ways and one that runs."""
    desk = Desk(folder, make_config(budget={"trials": 14, "epochs": 4}, **changes), concurrency=2)

    def make(spec: TrialSpec, epoch: int) -> EpochReport:
        bad = float(spec.params["lr"]) > 0.05  # type: ignore[arg-type]
        return report(spec, epoch, **({"val_accuracy": float("inf")} if bad else {}))

    running = desk.book.next()
    assert isinstance(running, Handout)
    desk.book.progress(running.number, Progress((report(running.spec, 1),)))
    for _ in range(8):
        turn = desk.book.next()
        assert isinstance(turn, Handout)
        desk.train(turn, make)
    desk.store._storage.close()  # its write-ahead log goes into the file
    return desk


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_rebuilt_study_equals_the_original_trial_by_trial(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    desk = half_done(
        tmp_path, constraints={"overhead_vs_adam": {"max": 2.0}}, warm_start=[{"lr": 0.02}] * 2
    )
    before = desk.stored()
    outcomes = {t.user_attrs["end"]["outcome"] for t in before if t.state.is_finished()}
    assert {"COMPLETE", "DIVERGED"} <= outcomes
    damage(study_file(desk))

    store, notes = reopened(desk)
    store.close()
    after = desk.stored()
    # The curve of a running trial comes again with its checkpoint.
    assert before[0].state == TrialState.RUNNING
    before[0].intermediate_values = {}
    assert after == before
    assert len(notes) == 1
    assert "rebuilt from the records of 9 trials" in notes[0]
    assert (desk.folder.root / "study.damaged-1.db").exists() == study_file_was_there(damage)
    again, quiet = reopened(desk)
    again.close()
    assert quiet == []  # once is enough


def study_file_was_there(damage: Callable[[Path], None]) -> bool:
    return damage is not DAMAGES["missing"]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "nsga2", "qmc", "gp"])
def test_a_rebuilt_study_suggests_what_the_original_would(sampler: str, tmp_path: Path) -> None:
    space = {
        "lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
        "momentum": {"type": "float", "low": 0.0, "high": 0.99},
        "nesterov": {"type": "categorical", "choices": [True, False]},
    }
    if sampler == "cmaes":
        del space["nesterov"]
    config = make_config(
        sampler={"name": sampler, "startup_trials": 2},
        space=space,
        budget={"trials": 12, "epochs": 2},
    )
    whole = Desk(tmp_path / "whole", config)
    whole.run()
    first = Desk(tmp_path / "pieces", config)
    for _ in range(7):
        turn = first.book.next()
        assert isinstance(turn, Handout)
        first.train(turn)
    first.store.close()
    truncated(study_file(first))
    second = Desk(tmp_path / "pieces", config)
    second.run()
    assert [row.params for row in second.rows()] == [row.params for row in whole.rows()]


def test_a_study_that_lost_its_newest_trials_gets_them_back(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    for _ in range(2):
        turn = desk.book.next()
        assert isinstance(turn, Handout)
        desk.train(turn)
    desk.store.close()
    shutil.copy(study_file(desk), tmp_path / "old.db")
    desk = Desk(tmp_path, desk.config)
    desk.run()
    before = desk.stored()
    desk.store.close()
    shutil.copy(tmp_path / "old.db", study_file(desk))  # set back, as a lost write-ahead log does
    for name in ("study.db-wal", "study.db-shm"):
        (desk.folder.root / name).unlink(missing_ok=True)
    store, notes = reopened(desk)
    store.close()
    assert desk.stored() == before
    assert "knows less than the trials' own records do" in notes[0]


def test_a_damaged_record_falls_back_and_a_lost_one_runs_again(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    desk.store.close()
    before = desk.stored()
    newest = desk.folder.trial(2) / TRIAL_FILE
    newest.write_bytes(newest.read_bytes()[:-20])  # handed out is what the one before says
    for name in (TRIAL_FILE, PREVIOUS_TRIAL_FILE):
        (desk.folder.trial(4) / name).write_bytes(b"00000000 00000000 {}\n")
    study_file(desk).unlink()

    again = Desk(tmp_path, desk.config)
    states = {row.number: row.state for row in again.rows()}
    assert states == {**dict.fromkeys(range(6), "COMPLETE"), 2: "RUNNING", 4: "RUNNING"}
    again.run()
    after = again.rows()
    assert {row.state for row in after} == {"COMPLETE"}
    assert after[2].params == before[2].params
    assert after[2].values == (accuracy(TrialSpec.from_dict(after[2].spec), 4),)


def test_records_that_are_missing_are_written_at_the_next_start(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    desk.store.close()
    whole = read_copies(desk.folder.root)
    (desk.folder.trial(3) / TRIAL_FILE).unlink()
    newest = desk.folder.trial(5)
    (newest / PREVIOUS_TRIAL_FILE).replace(newest / TRIAL_FILE)  # killed before its end was kept
    reopened(desk)[0].close()
    found = read_copies(desk.folder.root)
    assert {n: c.to_payload() for n, c in found.items()} == {
        n: c.to_payload() for n, c in whole.items()
    }


def test_a_finished_search_whose_study_is_damaged_is_one_to_resume(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    desk.store.close()
    for damage in (scrambled, empty, Path.unlink):
        assert is_finished(desk.folder)
        damage(study_file(desk))
        assert not is_finished(desk.folder)
        Desk(tmp_path, make_config()).store.close()  # rebuilt


def test_whoever_only_looks_is_told_what_to_do(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    desk.store.close()
    for damage in (scrambled, empty, Path.unlink):
        damage(study_file(desk))
        with pytest.raises(SearchFolderError, match=r"'topotune resume( demo)?' rebuilds it"):
            summaries(desk.folder, desk.config, {})


def test_what_a_record_holds_survives(tmp_path: Path) -> None:
    desk = half_done(tmp_path)
    for trial in desk.stored():
        copy = TrialCopy(trial, {"qmc": 3, "parents": [1, 2]})
        write_copy(desk.folder, copy)
        found = read_copies(desk.folder.root)[trial.number]
        found.trial._trial_id = trial._trial_id
        assert found.trial == trial
        assert found.study == {"qmc": 3}


@pytest.mark.parametrize(
    "damage",
    [truncated, empty, torn_json, flipped],
    ids=["truncated", "empty", "torn JSON of an older version", "a flipped digit"],
)
def test_a_damaged_ledger_is_the_one_before_and_then_the_trials_own(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    ended = {row.number: row.device_seconds for row in desk.rows()}
    ledger = Ledger(desk.folder.ledger, 1.0)
    ledger.wall_seconds, ledger.trials = 100.0, {0: 40.0, 1: 50.0}
    ledger.save()
    ledger.wall_seconds = 101.0
    ledger.save()

    damage(desk.folder.ledger)
    found = read_ledger(desk.folder.ledger)
    assert found == {"wall_seconds": 100.0, "trials": {0: 40.0, 1: 50.0}}
    assert "ledger is damaged" in caplog.text

    empty(desk.folder.root / "ledger.previous.json")
    found = read_ledger(desk.folder.ledger)
    assert found["trials"] == ended
    assert 0 < found["wall_seconds"] < 100
    assert "counted anew from the records of 6 trials" in caplog.text


def test_a_ledger_of_an_older_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    path.write_text('{"wall_seconds": 7.5, "trials": {"3": 2.5}}\n')
    assert read_ledger(path) == {"wall_seconds": 7.5, "trials": {3: 2.5}}
    assert Ledger(path, 1.0).device_seconds == 2.5


def test_epochs_from_before_a_rebuild_are_not_judged_anew(tmp_path: Path) -> None:
    config = make_config(budget={"trials": 9, "epochs": 4}, pruner="median")
    desk = Desk(tmp_path, config, concurrency=2)
    slow = desk.book.next()
    assert isinstance(slow, Handout)
    # Bad at first and the best at last: it stays, because it was early.
    curve = [report(slow.spec, n, val_accuracy=v) for n, v in ((1, 0.01), (2, 0.02), (3, 2.0))]
    for one in curve:
        assert desk.book.progress(slow.number, Progress((one,)))
    for _ in range(6):
        turn = desk.book.next()
        assert isinstance(turn, Handout)
        desk.train(turn)
    desk.store.close()
    study_file(desk).unlink()

    again = Desk(tmp_path, config)
    orphan = again.book.next()
    assert isinstance(orphan, Handout)
    assert orphan.number == slow.number
    assert again.book.progress(orphan.number, Progress(tuple(curve)))
    last = report(orphan.spec, 4)
    again.book.progress(orphan.number, Progress((last,), outcome=Outcome.COMPLETE))
    row = again.book.end(orphan.number)
    assert row is not None
    assert row.state == "COMPLETE"
    assert set(row.curve) == {1, 2, 3, 4}


def test_a_lost_trials_folder_is_moved_aside_whole(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    desk.store.close()
    for number in (2, 5):  # in the midst, and the newest
        home = desk.folder.trial(number)
        (home / TRIAL_FILE).unlink()
        (home / PREVIOUS_TRIAL_FILE).unlink()
        (home / "error.txt").write_text("old")
    study_file(desk).unlink()
    store, notes = reopened(desk)
    assert sum("runs again from its beginning" in note for note in notes) == 2
    for number in (2, 5):
        assert not desk.folder.trial(number).exists()
        aside = desk.folder.root / "trials.lost" / f"{number:04d}-1"
        assert (aside / "error.txt").read_text() == "old"
    store.close()
    again = Desk(tmp_path, desk.config)
    again.run()
    assert [row.state for row in again.rows()] == ["COMPLETE"] * 6


@pytest.mark.parametrize("lost", [(1,), (0, 3), (5,)], ids=str)
@pytest.mark.parametrize("kind", ["grid", "warm start"])
def test_queued_points_run_once_each_though_records_are_lost(
    lost: tuple[int, ...], kind: str, tmp_path: Path
) -> None:
    if kind == "grid":
        space = {"lr": {"type": "categorical", "choices": [n / 1000 for n in range(1, 10)]}}
        config = make_config(sampler="grid", space=space, budget={"trials": 100, "epochs": 1})
    else:
        points = [{"lr": n / 1000} for n in range(1, 10)]
        config = make_config(warm_start=points, budget={"trials": 9, "epochs": 1})
    desk = Desk(tmp_path, config)
    for _ in range(6):
        turn = desk.book.next()
        assert isinstance(turn, Handout)
        desk.train(turn)
    desk.store.close()
    for number in lost:
        shutil.rmtree(desk.folder.trial(number))
    study_file(desk).unlink()
    again = Desk(tmp_path, config)
    again.run()
    values = [row.params["lr"] for row in again.rows()]
    assert sorted(map(str, values)) == [str(n / 1000) for n in range(1, 10)]


def test_a_study_of_another_optuna_is_refused_with_the_fix_and_left_alone(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    desk.store.close()
    with closing(sqlite3.connect(study_file(desk))) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99'")
    connection.close()
    with pytest.raises(ResourceError, match=r"study\.db: .*Use the Optuna it was made with"):
        reopened(desk)
    assert not list(desk.folder.root.glob("study.damaged*"))


@pytest.mark.parametrize("number", [3, 1_000_000_000, -1])
def test_a_record_that_is_not_its_folders_is_as_none(number: int, tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    desk.store.close()
    home = desk.folder.trial(2)
    payload = read_copies(desk.folder.root)[2].to_payload()
    for name in (TRIAL_FILE, PREVIOUS_TRIAL_FILE):
        (home / name).write_bytes(encode(payload | {"number": number}))
    assert sorted(read_copies(desk.folder.root)) == [0, 1, 3, 4, 5]
    (desk.folder.root / "trials" / "1000000000").mkdir()
    far = desk.folder.root / "trials" / "1000000000" / TRIAL_FILE
    far.write_bytes(encode(payload | {"number": 1_000_000_000}))
    assert sorted(read_copies(desk.folder.root)) == [0, 1, 3, 4, 5]


def test_a_study_that_is_lost_with_all_records_is_not_begun_again(tmp_path: Path) -> None:
    for name, damage in DAMAGES.items():
        desk = Desk(tmp_path / name, make_config())
        desk.run()
        desk.store.close()
        for number in range(6):
            home = desk.folder.trial(number)
            (home / TRIAL_FILE).unlink()
            (home / PREVIOUS_TRIAL_FILE).unlink()
            (home / "error.txt").write_text("old")
        damage(study_file(desk))
        with pytest.raises(SearchFolderError, match=r"study\.db: .*they kept no records.*begin"):
            reopened(desk)
        assert (desk.folder.trial(0) / "error.txt").exists()
        shutil.rmtree(desk.folder.root / "trials")  # as it says
        study_file(desk).unlink(missing_ok=True)
        again = Desk(tmp_path / name, desk.config)
        again.run()
        again.store.close()


NESTED = '{"a":' * 100_000
ENDLESS = (
    '{"name": "FloatDistribution", "attributes": '
    '{"low": -1e999, "high": 1e999, "step": 0.1, "log": false}}'
)
HOSTILE: dict[str, dict[str, Any]] = {
    "a start with a zone": {"start": "2026-01-01T00:00:00+00:00"},
    "no start": {"start": None},
    "no values": {"values": None},
    "too many values": {"values": [0.5, 0.5]},
    "a parameter outside its range": {"params": "outside"},
    "a range of any depth": {"params": {"lr": [NESTED, 0.1]}},
    "an endless range": {"params": {"lr": [ENDLESS, 0.1]}},
    "an end that is a list": {"end": [1]},
    "an end without seconds": {"end": {"device_seconds": None}},
    "an endless end": {"end": {"device_seconds": 10**400}},
    "an end with metrics that are a list": {"end": {"metrics": [1]}},
    "an unknown outcome": {"end": {"outcome": "GREAT"}},
    "a spec without content": {"spec": {}},
    "a spec that is null": {"spec": None},
    "deaths that are a number": {"deaths": 3},
    "fixed parameters that are a number": {"system": {"fixed_params": 5}},
    "a constraint that is a word": {"system": {"constraints:finished": "x"}},
}


def hostile(payload: dict[str, Any], change: dict[str, Any]) -> bytes:
    """A trial's record with one thing in it as nobody of ours writes it."""
    payload = json.loads(json.dumps(payload))
    for key, value in change.items():
        if key == "end" and isinstance(value, dict):
            payload["user"]["end"] |= value
        elif key in ("end", "spec", "deaths"):
            payload["user"][key] = value
        elif value == "outside":
            payload["params"]["lr"][1] = 7.0
        else:
            payload[key] = value
    return encode(payload)


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_record_is_as_a_damaged_one(change: dict[str, Any], tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    desk.store.close()
    payload = read_copies(desk.folder.root)[2].to_payload()
    (desk.folder.trial(2) / TRIAL_FILE).write_bytes(hostile(payload, change))
    study_file(desk).unlink()
    for name in ("ledger.json", "ledger.previous.json"):
        (desk.folder.root / name).unlink(missing_ok=True)

    read_ledger(desk.folder.ledger)
    store, notes = reopened(desk)  # the record before it says that the trial runs
    store.close()
    assert "rebuilt from the records of 6 trials" in notes[0]
    assert {row.number: row.state for row in desk.rows()} == {
        **dict.fromkeys(range(6), "COMPLETE"),
        2: "RUNNING",
    }


def test_a_ledger_is_counted_from_records_of_any_zone(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    desk.store.close()
    for name in ("ledger.json", "ledger.previous.json"):
        (desk.folder.root / name).unlink(missing_ok=True)
    home = desk.folder.trial(2)
    changes: list[dict[str, Any]] = [HOSTILE["a start with a zone"], {"end": [1]}, {"end": {}}]
    for change in changes:
        payload = TrialCopy(desk.stored()[2], {}).to_payload()
        for name in (TRIAL_FILE, PREVIOUS_TRIAL_FILE):
            (home / name).write_bytes(hostile(payload, change | {"number": 2}))
        assert read_ledger(desk.folder.ledger)["trials"].keys() >= {0, 1, 3, 4, 5}


def set_note(desk: Desk, number: int, key: str, value: object) -> None:
    """Write a trial's note as whoever has the database can."""
    trial = "(SELECT trial_id FROM trials WHERE number = ?)"
    with closing(sqlite3.connect(study_file(desk))) as connection, connection:
        connection.execute(
            "UPDATE trial_user_attributes SET value_json = ? WHERE key = ? AND trial_id = " + trial,
            (json.dumps(value), key, number),
        )
    connection.close()


@pytest.mark.parametrize(
    ("number", "key", "value"),
    [
        (1, "end", [1]),
        (1, "end", {"outcome": "COMPLETE"}),
        (1, "spec", 3),
        (0, "spec", {}),
        (0, "spec", {"task": "digits", "method": "adam", "epochs": 1, "seed": 1, "x": 1}),
    ],
)
def test_a_hostile_note_in_a_study_is_an_error_of_ours(
    number: int, key: str, value: object, tmp_path: Path
) -> None:
    desk = half_done(tmp_path)  # trial 0 runs
    desk.store.close()
    set_note(desk, number, key, value)
    with pytest.raises(SearchFolderError, match=f"record of trial {number} is damaged.*rebuilds"):
        Desk(tmp_path, desk.config).book.next()


def test_a_study_whose_trial_contradicts_itself_is_not_rebuilt_from_it(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    desk.store.close()
    for name in (TRIAL_FILE, PREVIOUS_TRIAL_FILE):
        (desk.folder.trial(2) / name).unlink()
    with closing(sqlite3.connect(study_file(desk))) as connection, connection:
        connection.execute(
            "DELETE FROM trial_values WHERE trial_id = (SELECT trial_id FROM trials WHERE "
            "number = 2)"
        )
        connection.execute("UPDATE trials SET state = 'RUNNING' WHERE number = 4")
    connection.close()
    with pytest.raises(SearchFolderError, match=r"trials/0002: what is known .* contradicts"):
        reopened(desk)
