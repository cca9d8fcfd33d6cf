"""The study's journal: what Optuna reads of it, and what is made of one that is torn or damaged."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests.search_cases import (
    Desk,
    accuracy,
    edit_note,
    edit_study,
    make_config,
    report,
    study_files,
)
from topotune import files
from topotune.errors import LeaseLostError, ResourceError, SearchFolderError
from topotune.records import EpochReport, Outcome, TrialSpec
from topotune.search.drive.book import Progress
from topotune.search.place.folder import SearchFolder
from topotune.search.status import is_finished
from topotune.search.study.journal import Journal, JournalReader
from topotune.search.study.patience import Patience
from topotune.search.study.rows import summaries
from topotune.search.study.store import Handout, StudyStore


def reopened(desk: Desk) -> tuple[StudyStore, list[str]]:
    """The study as a resume opens it, and what was noted."""
    desk.store.close()
    notes: list[str] = []
    patience = Patience(str(study_files(desk.folder)[0]), notes.append)
    return StudyStore(desk.folder, desk.config, patience=patience), notes


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scrambled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1024:-1024] = bytes(i * 37 % 251 for i in range(len(content) - 2048))
    path.write_bytes(content)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def line_lost(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[len(lines) // 2]
    path.write_bytes(b"".join(lines))


def line_doubled(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(9, lines[9])
    path.write_bytes(b"".join(lines))


def binary(path: Path) -> None:
    path.write_bytes(b"\xff" * 9000)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    """A journal as Optuna itself writes it, without checksums."""
    path.unlink()
    optuna.create_study(storage=JournalStorage(JournalFileBackend(str(path))))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncated,
    "scrambled": scrambled,
    "a bit flipped": flipped,
    "a line lost": line_lost,
    "a line doubled": line_doubled,
    "empty": empty,
    "binary": binary,
    "another journal": foreign,
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
    return desk


@pytest.mark.parametrize("hurt", [0, 1], ids=["the file", "its copy"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_study_is_made_whole_from_its_copy_trial_by_trial(
    damage: Callable[[Path], None], hurt: int, tmp_path: Path
) -> None:
    desk = half_done(
        tmp_path, constraints={"overhead_vs_adam": {"max": 2.0}}, warm_start=[{"lr": 0.02}] * 2
    )
    before = desk.stored()
    outcomes = {t.user_attrs["end"]["outcome"] for t in before if t.state.is_finished()}
    assert {"COMPLETE", "DIVERGED"} <= outcomes
    assert before[0].state == TrialState.RUNNING
    desk.store.close()
    paths = study_files(desk.folder)
    content = paths[0].read_bytes()
    assert paths[1].read_bytes() == content
    damage(paths[hurt])
    kept = paths[hurt].read_bytes() if paths[hurt].exists() else b""

    assert len(desk.rows()) == 9  # who only looks needs no repair
    store, notes = reopened(desk)
    store.close()
    assert desk.stored() == before
    assert [path.read_bytes() for path in paths] == [content] * 2
    aside = desk.folder.root / f"{paths[hurt].stem}.damaged-1.jsonl"
    if damage in (truncated, empty):  # as after a power loss
        assert not aside.exists()
        assert ("lacks its newest records" in "".join(notes)) == (hurt == 0)
    else:
        assert len(notes) == 1
        assert notes[0].startswith(f"warning: {paths[hurt].name} is ")
        assert notes[0].endswith(f"made whole from {paths[1 - hurt].name}")
        assert aside.exists() == bool(kept)
        assert not kept or aside.read_bytes() == kept
    again, quiet = reopened(desk)
    again.close()
    assert quiet == []  # once is enough


def test_every_flipped_bit_is_found_by_its_line(tmp_path: Path) -> None:
    desk = half_done(tmp_path)
    desk.store.close()
    path, copy = study_files(desk.folder)
    content = path.read_bytes()
    copy.unlink()
    generator = random.Random(5)
    ends = [i for i, byte in enumerate(content) if byte == 10]
    for _ in range(300):
        place = generator.randrange(ends[-20])
        hurt = bytearray(content)
        hurt[place] ^= 1 << generator.randrange(8)
        path.write_bytes(hurt)
        line = sum(end < place for end in ends) + 1
        with pytest.raises(SearchFolderError, match=rf"damaged \(study\.jsonl at line {line}\)"):
            JournalReader((path, copy)).read_logs(0)


@pytest.mark.parametrize("hurt", [0, 1], ids=["the file", "its copy"])
def test_any_flipped_bit_of_the_last_line_is_mended(hurt: int, tmp_path: Path) -> None:
    """Also that of its newline, after which the file is as long as before."""
    paths = tmp_path / "study.jsonl", tmp_path / "study.copy.jsonl"
    journal = Journal(paths)
    for number in range(3):
        journal.append_logs([{"op_code": 0, "study_name": f"study {number}"}])
        journal.commit(force=True)
    content = paths[0].read_bytes()
    for place in range(content[:-1].rindex(b"\n") + 1, len(content)):
        flawed = bytearray(content)
        flawed[place] ^= 4
        paths[hurt].write_bytes(flawed)
        Journal(paths)
        assert [path.read_bytes() for path in paths] == [content] * 2


def test_stock_optuna_reads_the_file_and_goes_on_reading(tmp_path: Path) -> None:
    desk = half_done(tmp_path)
    path = study_files(desk.folder)[0]
    stock = optuna.load_study(
        study_name="demo", storage=JournalStorage(JournalFileBackend(str(path)))
    )
    ours = desk.store._study.get_trials()
    assert stock.get_trials() == ours
    desk.run()
    assert len(stock.get_trials()) == len(ours) + 5
    assert stock.get_trials() == desk.store._study.get_trials()
    for line in path.read_bytes().splitlines():
        assert set(json.loads(line)) >= {"op_code", "worker_id", "crc"}


def times(desk: Desk) -> dict[Path, tuple[int, int]]:
    """Each file with its size and when it was changed."""
    found = {path: path.stat() for path in desk.folder.root.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def test_a_reader_follows_a_driver_and_changes_nothing(tmp_path: Path) -> None:
    desk = half_done(tmp_path)
    before = times(desk)
    reader = JournalStorage(JournalReader(study_files(desk.folder)))
    assert len(reader.get_all_trials(0)) == 9
    assert times(desk) == before
    desk.run()
    assert reader.get_all_trials(0) == desk.store._study.get_trials()
    with pytest.raises(ResourceError, match="read-only"):
        reader.set_study_user_attr(0, "key", "value")
    assert len(reader.get_all_trials(0)) == 14


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "nsga2", "qmc", "gp"])
def test_a_study_that_was_made_whole_suggests_what_the_original_would(
    sampler: str, tmp_path: Path
) -> None:
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
    truncated(study_files(first.folder)[0])
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
    path = study_files(desk.folder)[0]
    shutil.copy(path, tmp_path / "old")
    desk = Desk(tmp_path, desk.config)
    desk.run()
    before = desk.stored()
    desk.store.close()
    shutil.copy(tmp_path / "old", path)  # set back
    store, notes = reopened(desk)
    store.close()
    assert desk.stored() == before
    expected = "study.jsonl lacks its newest records; made whole from study.copy.jsonl"
    assert notes == [f"warning: {expected}"]


def test_a_turn_is_whole_or_absent_wherever_a_crash_tore_it(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.train(handed(desk))
    desk.store.close()
    paths = study_files(desk.folder)
    before, count = paths[0].read_bytes(), len(list(Journal(paths).read_logs(0)))
    again = Desk(tmp_path, desk.config)
    handed(again)
    turn = paths[0].read_bytes().removeprefix(before)
    assert turn.count(b"\n") >= 3
    assert len(again.stored()) == 2
    ends = [size for size, byte in enumerate(turn) if byte == 10]
    for size in {*range(0, len(turn), 50), *ends, *(end + 1 for end in ends[:-1])}:
        for path in paths:
            path.write_bytes(before + turn[:size])
        notes: list[str] = []
        assert len(list(Journal(paths, notes.append).read_logs(0))) == count
        assert notes == []
        assert paths[0].read_bytes() == paths[1].read_bytes() == before


def handed(desk: Desk) -> Handout:
    turn = desk.book.next()
    assert isinstance(turn, Handout)
    return turn


def reopened_quietly(desk: Desk) -> tuple[StudyStore, list[str]]:
    notes: list[str] = []
    patience = Patience("", notes.append)
    return StudyStore(desk.folder, desk.config, patience=patience), notes


def test_what_a_power_loss_leaves_of_the_copy_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is forced at a trial's end only; until then the file alone is sure to be there."""
    forced: dict[str, int] = {}
    put = files.put

    def watched(handle: int, content: bytes, force: bool = True) -> None:
        put(handle, content, force)
        if force:
            forced[Path(f"/proc/self/fd/{handle}").readlink().name] = os.fstat(handle).st_size

    monkeypatch.setattr(files, "put", watched)
    desk = Desk(tmp_path, make_config())
    desk.train(handed(desk))
    path, copy = study_files(desk.folder)
    assert forced[copy.name] == forced[path.name] == path.stat().st_size
    running = handed(desk)
    desk.book.progress(running.number, Progress((report(running.spec, 1),)))
    assert forced[copy.name] < copy.stat().st_size == path.stat().st_size == forced[path.name]
    before = desk.stored()
    os.truncate(copy, forced[copy.name])
    store, notes = reopened_quietly(desk)
    assert notes == []
    assert store._study.get_trials() == before
    assert copy.read_bytes() == path.read_bytes()


def hurt_line(path: Path, line: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(b"op_code", b"op_cote")
    path.write_bytes(b"".join(lines))


def test_files_that_are_damaged_at_different_places_make_each_other_whole(tmp_path: Path) -> None:
    desk = half_done(tmp_path)
    desk.store.close()
    paths = study_files(desk.folder)
    content = paths[0].read_bytes()
    for damages in (((7, 30), (12, 51)), ((12,), (7, 30, 70)), ((30,), ())):
        for path, lines in zip(paths, damages, strict=True):
            path.write_bytes(content)
            for line in lines:
                hurt_line(path, line)
        assert len(desk.rows()) == 9
        _, notes = reopened_quietly(desk)
        assert len(notes) == sum(map(bool, damages))
        assert [path.read_bytes() for path in paths] == [content] * 2


def test_a_damage_is_mended_though_a_kill_kept_the_last_turn_from_the_copy(tmp_path: Path) -> None:
    desk = half_done(tmp_path)
    paths = study_files(desk.folder)
    copy = paths[1].read_bytes()
    handed(desk)
    content = paths[0].read_bytes()
    paths[1].write_bytes(copy)
    hurt_line(paths[0], 30)
    assert len(desk.rows()) == 10
    _, notes = reopened_quietly(desk)
    assert notes[0].startswith("warning: study.jsonl is damaged at line 30; moved to ")
    assert [path.read_bytes() for path in paths] == [content] * 2


def test_one_line_damaged_in_both_files_is_an_error_that_names_it(tmp_path: Path) -> None:
    desk = half_done(tmp_path)
    desk.store.close()
    paths = study_files(desk.folder)
    content = paths[0].read_bytes()
    for path in paths:
        hurt_line(path, 30)
    hurt_line(paths[0], 7)
    hurt = [path.read_bytes() for path in paths]
    fault = r"study\.jsonl: the study is damaged \(study\.jsonl at line 7 and study\.copy\.jsonl "
    for look in (desk.rows, lambda: reopened_quietly(desk)):
        with pytest.raises(SearchFolderError, match=fault + "at line 30"):
            look()
    assert not is_finished(desk.folder)
    assert [path.read_bytes() for path in paths] == hurt  # nothing is touched
    paths[1].write_bytes(content)  # brought back from a backup, as it says
    reopened_quietly(desk)[0].close()
    assert paths[0].read_bytes() == content


def test_a_finished_search_whose_study_is_damaged_is_finished_and_made_whole(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    desk.store.close()
    paths = study_files(desk.folder)
    content = paths[0].read_bytes()
    for damage in (scrambled, empty, Path.unlink):
        damage(paths[0])
        assert is_finished(desk.folder)
        Desk(tmp_path, make_config()).store.close()
        assert paths[0].read_bytes() == content
    for path in paths:
        path.unlink()
    assert not is_finished(desk.folder)


def test_epochs_that_a_study_has_lost_are_not_judged_anew(tmp_path: Path) -> None:
    config = make_config(budget={"trials": 9, "epochs": 4}, pruner="median")
    desk = Desk(tmp_path, config, concurrency=2)
    slow = handed(desk)
    # Bad at first and the best at last: it stays, because it was early.
    curve = [report(slow.spec, n, val_accuracy=v) for n, v in ((1, 0.01), (2, 0.02), (3, 2.0))]
    for one in curve:
        assert desk.book.progress(slow.number, Progress((one,)))
    for _ in range(6):
        desk.train(handed(desk))
    desk.store.close()
    edit_study(
        desk.folder,
        lambda record: record.get("trial_id") != 0 or "step" not in record,
    )

    again = Desk(tmp_path, config)
    assert again.rows()[0].curve == {}
    orphan = handed(again)
    assert orphan.number == slow.number
    assert again.book.progress(orphan.number, Progress(tuple(curve)))
    last = report(orphan.spec, 4)
    again.book.progress(orphan.number, Progress((last,), outcome=Outcome.COMPLETE))
    row = again.book.end(orphan.number)
    assert row is not None
    assert row.state == "COMPLETE"
    assert set(row.curve) == {1, 2, 3, 4}


def test_a_study_that_knows_less_than_has_run_is_not_gone_on_with(tmp_path: Path) -> None:
    for name, damage in DAMAGES.items():
        desk = Desk(tmp_path / name, make_config())
        desk.run()
        desk.store.close()
        for number in range(6):
            home = desk.folder.trial(number)
            home.mkdir(parents=True)
            (home / "spool.jsonl").write_text("old")
        for path in study_files(desk.folder):
            damage(path)
        with pytest.raises(SearchFolderError, match=r"study\.jsonl: .*leaderboard\.json holds"):
            reopened_quietly(desk)
        assert (desk.folder.trial(0) / "spool.jsonl").exists()
        shutil.rmtree(desk.folder.root / "trials")  # begin again
        for path in study_files(desk.folder):
            path.unlink(missing_ok=True)
        again = Desk(tmp_path / name, desk.config)
        again.run()
        again.store.close()


def test_a_turn_that_the_disk_did_not_take_is_written_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, make_config())
    desk.train(handed(desk))
    paths, whole = study_files(desk.folder), files.put
    for hurt in paths:
        before = [path.read_bytes() for path in paths]

        def full(handle: int, content: bytes, force: bool = True, name: str = hurt.name) -> None:
            if Path(f"/proc/self/fd/{handle}").readlink().name == name:
                os.write(handle, content[:30])
                raise OSError(errno.ENOSPC, "No space left on device")
            whole(handle, content, force)

        with monkeypatch.context() as patch:
            patch.setattr(files, "put", full)
            with pytest.raises(ResourceError, match=rf"{hurt.name}: cannot be written: No space"):
                desk.book.next()
        assert hurt.read_bytes() == before[paths.index(hurt)]
    desk.store.commit()
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(desk.rows()) == 3


def test_a_driver_that_was_replaced_writes_nothing(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    lost: list[object] = []

    def fence() -> None:
        if lost:
            raise LeaseLostError("another driver")

    store = StudyStore(desk.folder, desk.config, fence=fence)
    store.next()
    store.commit()
    before = [path.read_bytes() for path in study_files(desk.folder)]
    lost.append(1)
    store.next()
    with pytest.raises(LeaseLostError):
        store.commit()
    with pytest.raises(LeaseLostError):
        store.close()
    assert [path.read_bytes() for path in study_files(desk.folder)] == before


def test_a_file_that_shrank_under_its_driver_is_not_appended_to(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.train(handed(desk))
    path = study_files(desk.folder)[0]
    truncated(path)
    size = path.stat().st_size
    with pytest.raises(ResourceError, match=r"study\.jsonl: cannot be written: it has \d+ bytes"):
        desk.book.next()
    assert path.stat().st_size == size


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "an unknown operation": lambda record: record.update(op_code=99),
    "no operation": lambda record: record.pop("op_code"),
    "a trial that is not there": lambda record: record.update(trial_id=10**9),
    "a trial that is a word": lambda record: record.update(trial_id="x"),
    "a range of any depth": lambda record: record.update(distribution='{"a":' * 9_000),
    "a start that is no time": lambda record: record.update(datetime_start="soon"),
    "a state that is none": lambda record: record.update(state=77),
    "values that are a word": lambda record: record.update(values="x"),
    "an attribute that is a list": lambda record: record.update(user_attr=[1]),
    "a study of another name": lambda record: record.update(study_name=7),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_intact_lines_that_no_optuna_wrote_are_an_error_of_ours(
    change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    desk = half_done(tmp_path)
    desk.store.close()

    def hostile(record: dict[str, Any]) -> None:
        change(record)

    edit_study(desk.folder, hostile)
    for look in (desk.rows, lambda: reopened_quietly(desk)):
        with suppress(SearchFolderError):  # nothing else comes out
            look()


@pytest.mark.parametrize(
    ("number", "key", "value"),
    [
        (1, "end", [1]),
        (1, "end", {"outcome": "COMPLETE"}),
        (1, "end", None),
        (1, "spec", 3),
        (1, "spec", None),
        (0, "spec", {}),
        (0, "spec", {"task": "digits", "method": "adam", "epochs": 1, "seed": 1, "x": 1}),
        (1, "constraints:finished", "x"),
    ],
)
def test_a_hostile_note_in_a_study_is_an_error_of_ours(
    number: int, key: str, value: object, tmp_path: Path
) -> None:
    desk = half_done(tmp_path)  # trial 0 runs
    desk.store.close()
    edit_note(desk.folder, number, key, value)
    with pytest.raises(SearchFolderError, match=f"record of trial {number} is damaged.*backup"):
        Desk(tmp_path, desk.config).book.next()


@pytest.mark.parametrize(
    "change",
    [
        {"outcome": "GREAT"},
        {"device_seconds": None},
        {"device_seconds": 10**400},
        {"device_seconds": -1},
        {"metrics": [1]},
        {"reason": 5},
    ],
    ids=str,
)
def test_a_hostile_end_in_a_study_is_an_error_of_ours(
    change: dict[str, Any], tmp_path: Path
) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    end = desk.stored()[2].user_attrs["end"]
    desk.store.close()
    edit_note(desk.folder, 2, "end", end | change)
    with pytest.raises(SearchFolderError, match="record of trial 2 is damaged"):
        summaries(desk.folder, desk.config)


def test_a_study_whose_trial_contradicts_itself_is_refused(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    desk.store.close()

    def without_values(record: dict[str, Any]) -> None:
        if record.get("trial_id") == 2 and record.get("values"):
            record["values"] = None

    edit_study(desk.folder, without_values)
    with pytest.raises(SearchFolderError, match=r"trial 2 is damaged .*the trial has no values"):
        reopened_quietly(desk)


@pytest.mark.parametrize("value", [[], {"wall_seconds": "x", "trials": {}}, {"trials": {"0": []}}])
def test_a_hostile_note_of_the_time_is_an_error_of_ours(value: object, tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.ledger.save()
    desk.store.close()

    def change(record: dict[str, Any]) -> None:
        if "topotune:spent" in record.get("system_attr", ()):
            record["system_attr"] = {"topotune:spent": value}

    edit_study(desk.folder, change)
    with pytest.raises(SearchFolderError, match="note of its time is damaged"):
        Desk(tmp_path, desk.config)
    with pytest.raises(SearchFolderError, match="note of its time is damaged"):
        desk.rows()


def test_a_folder_of_another_layout_is_refused_with_one_sentence(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.store.close()
    identity = json.loads(desk.folder.meta.read_text())
    for layout, maker in ((None, "topotune 0.1.0"), (3, "a newer topotune")):
        changed = {k: v for k, v in identity.items() if k != "layout"}
        changed |= {} if layout is None else {"layout": layout}
        desk.folder.meta.write_text(json.dumps(changed))
        with pytest.raises(SearchFolderError, match=f"demo: was made by {maker}, whose results"):
            SearchFolder.open(tmp_path, "demo")


def test_a_report_costs_one_forced_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, make_config(budget={"trials": 2, "epochs": 8}))
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", forced.append)
    desk.train(handed(desk))
    # As it is handed out, at each report but the last, and both files at its end.
    assert len(forced) == 1 + 7 + 2
    assert desk.rows()[0].values == (accuracy(TrialSpec.from_dict(desk.rows()[0].spec), 8),)


def test_opening_is_one_pass_over_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = half_done(tmp_path)
    desk.store.close()
    lines = study_files(desk.folder)[0].read_bytes().splitlines()
    loads = json.loads
    read: list[object] = []

    def counted(text: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(text, bytes):  # a record; a distribution is text
            read.append(text)
        return loads(text, *args, **kwargs)

    monkeypatch.setattr(json, "loads", counted)
    Journal(study_files(desk.folder)).read_logs(0)
    assert len(read) == len(lines)
