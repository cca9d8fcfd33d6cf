"""A results folder that is moved or copied takes its artifacts along."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.places import _COLUMNS, rebase
from topotune.tracking.registry import register_model
from topotune.tracking.store import NewRun

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's and SQLAlchemy's
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A results folder with a run, its artifact, a model version and a logged model; the run."""
    folder = tmp_path_factory.mktemp("results at first #1")
    return folder, fill(folder)


def fill(folder: Path) -> str:
    store = MlflowStore.embedded(folder)
    run = store.create_run(NewRun("s1", 0, "a", 1))
    note(store, run, folder.parent / "old.txt")
    register_model(store, run, [folder.parent / "old.txt"], "digits", "best")
    store.client().create_logged_model(store.experiment_id, "m")
    return run


def note(store: MlflowStore, run: str, path: Path) -> None:
    path.write_text("kept", encoding="utf-8")
    store.log_artifact(run, path, "notes")


def names(store: MlflowStore, run: str) -> list[str]:
    return sorted(file.path for file in store.client().list_artifacts(run, "notes"))


def addresses(folder: Path) -> dict[str, list[str]]:
    """All local addresses of the database, by column."""
    with closing(sqlite3.connect(folder / "mlflow/mlflow.db")) as database:
        return {
            f"{column.table}.{column.name}": [
                text
                for (text,) in database.execute(
                    f"SELECT {column.name} FROM {column.table} WHERE {column.rows} "
                    f"AND {column.name} LIKE 'file:%'"
                )
            ]
            for column in _COLUMNS
        }


@pytest.mark.parametrize("how", ["moved", "copied", "linked"])
def test_artifacts_of_old_and_new_runs_are_taken_after_a_move(
    how: str, made: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, run = made
    there = tmp_path / "ü 100"
    origin = tmp_path / "origin"
    if how == "moved":  # within one process, which knows the run by its id already
        run = fill(origin)
        origin.rename(there)
    elif how == "copied":
        shutil.copytree(first, there)
    else:
        run = fill(origin)
        origin.rename(tmp_path / "real")
        there.symlink_to(tmp_path / "real")
    before = addresses(first)
    with caplog.at_level(logging.WARNING):
        store = MlflowStore.embedded(there)
        note(store, run, tmp_path / "new.txt")
        later = store.create_run(NewRun("s1", 1, "b", 1))
        note(store, later, tmp_path / "new.txt")
        MlflowStore.embedded(there).ping()
    assert names(store, run) == ["notes/new.txt", "notes/old.txt"]
    assert names(store, later) == ["notes/new.txt"]
    assert len(list(there.rglob("new.txt"))) == 2
    assert not origin.exists()
    assert addresses(first) == before
    assert not list(first.rglob("new.txt"))
    root = (there / "mlflow/artifacts").as_uri()
    found = addresses(there)
    assert all(text.startswith(root) for texts in found.values() for text in texts)
    for column in ("runs.artifact_uri", "experiments.artifact_location"):
        assert found[column]
    assert found["logged_models.artifact_location"]
    assert [record.getMessage().count("was moved or copied here") for record in caplog.records] == [
        1
    ]
    versions = register_model(store, run, [tmp_path / "new.txt"], "digits", "best")
    assert versions == "2"


def test_every_address_of_the_database_is_known(made: tuple[Path, str]) -> None:
    """Whatever column of MLflow's tables holds the folder's path is re-based."""
    folder, _ = made
    known = {(column.table, column.name) for column in _COLUMNS}
    found = set()
    with closing(sqlite3.connect(folder / "mlflow/mlflow.db")) as database:
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master")]
        for table in tables:
            for column in database.execute(f"PRAGMA table_info('{table}')").fetchall():
                query = f'SELECT 1 FROM "{table}" WHERE instr(CAST("{column[1]}" AS TEXT), ?)'
                for path in (str(folder), folder.as_uri()):
                    if database.execute(query, (path,)).fetchone():
                        found.add((table, column[1]))
    assert ("runs", "artifact_uri") in found
    assert found <= known


def test_a_store_that_lies_where_it_was_is_not_written(
    made: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = made
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    database, artifacts = copy / "mlflow/mlflow.db", copy / "mlflow/artifacts"
    assert (
        rebase(database, artifacts, "topotune") == 3
    )  # of an experiment, a run and a logged model
    content = database.read_bytes()
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # someone writes: nothing to do is not held up
        assert rebase(database, artifacts, "topotune") == 0
        other.execute("ROLLBACK")
    assert database.read_bytes() == content


def test_runs_that_are_not_ours_stay_where_they_are(made: tuple[Path, str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made[0], copy)
    client = MlflowStore.embedded(copy).client()
    places = ["s3://bucket/x", "mlflow-artifacts:/7", (tmp_path / "own").as_uri()]
    ids = [client.create_experiment(f"own {i}", place) for i, place in enumerate(places)]
    runs = [client.create_run(one).info for one in ids]
    MlflowStore.embedded(copy).ping()
    assert [client.get_experiment(one).artifact_location for one in ids] == places
    assert [client.get_run(one.run_id).info.artifact_uri for one in runs] == [
        one.artifact_uri for one in runs
    ]


def test_two_that_see_the_folder_under_two_paths_do_not_hurt_each_other(
    made: tuple[Path, str], tmp_path: Path
) -> None:
    copy, run = tmp_path / "copy", made[1]
    shutil.copytree(made[0], copy)
    store = MlflowStore.embedded(copy)
    note(store, run, tmp_path / "one.txt")
    with closing(sqlite3.connect(copy / "mlflow/mlflow.db")) as database, database:
        for table, name in (("runs", "artifact_uri"), ("experiments", "artifact_location")):
            database.execute(f"UPDATE {table} SET {name} = replace({name}, 'copy', 'mounted')")
    note(store, run, tmp_path / "two.txt")
    assert names(store, run) == ["notes/old.txt", "notes/one.txt", "notes/two.txt"]
    assert not (tmp_path / "mounted").exists()


def test_two_processes_open_a_moved_folder_at_once(made: tuple[Path, str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made[0], copy)
    code = (
        "import sys, pathlib\n"
        "from topotune.tracking.mlflow import MlflowStore\n"
        "store = MlflowStore.embedded(pathlib.Path(sys.argv[1]))\n"
        "store.log_artifact(sys.argv[2], pathlib.Path(sys.argv[3]), sys.argv[4])\n"
    )
    (tmp_path / "new.txt").write_text("kept", encoding="utf-8")
    outputs: list[tuple[int, str]] = []

    def start(folder: str) -> None:
        command = [sys.executable, "-c", code, str(copy), made[1], str(tmp_path / "new.txt")]
        done = subprocess.run([*command, folder], capture_output=True, text=True, check=False)
        outputs.append((done.returncode, done.stderr))

    threads = [threading.Thread(target=start, args=(folder,)) for folder in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [code for code, _ in outputs] == [0, 0]
    assert sum(text.count("was moved or copied here") for _, text in outputs) == 1
    assert len(list(copy.rglob("new.txt"))) == 2
