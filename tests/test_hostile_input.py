"""Files and names from other people: none runs, leaves its folder or paints a screen."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.search_cases import Desk, edit_note, make_config
from topotune.cli.main import app, main
from topotune.config.models import SearchConfig
from topotune.errors import (
    CheckpointError,
    ConfigError,
    OutboxError,
    RunError,
    SearchFolderError,
    TrackingError,
)
from topotune.records import TrialSpec
from topotune.results.trace import read_trace
from topotune.search.drive.recorder import Recorder, leaderboard
from topotune.search.place.folder import SearchFolder
from topotune.tracking.entries import Tags, from_payload
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.outbox import Outbox, bodies_of
from topotune.tracking.pages import trials_page
from topotune.tracking.registry import _plain
from topotune.tracking.shipper import Shipper
from topotune.tracking.store import StoreOfflineError
from topotune.train.checkpoint import _MAGIC, CHECKPOINT_FILE, CheckpointStore
from topotune.train.trace import read_columns

NASTY = "a\x1b[2J\x1b]0;owned\x07\u202e\x9b31mb"


def controls(text: str) -> list[str]:
    """Characters that a terminal would obey; line ends and tabs apart."""
    return [c for c in text if not c.isprintable() and c not in "\n\t"]


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_a_checkpoint_that_would_run_code_does_not(tmp_path: Path, way: str) -> None:
    marker = tmp_path / "owned"
    content = {"model": Evil(marker)}
    buffer = io.BytesIO()
    buffer.write(b'{"identity": {}, "record": {}}\n')
    if way == "torch":
        torch.save(content, buffer)
    else:
        buffer.write(pickle.dumps(content))
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest().encode()
    (tmp_path / CHECKPOINT_FILE).write_bytes(_MAGIC + digest + b"\n" + payload)
    with pytest.raises(CheckpointError, match="cannot be decoded"):
        CheckpointStore(tmp_path, TrialSpec("digits", "adam", 1, 0)).load()
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))  # and it would have
    assert marker.exists()


def test_an_archive_of_objects_is_refused(tmp_path: Path) -> None:
    marker, path = tmp_path / "owned", tmp_path / "trace.npz"
    np.savez(path, step=np.array([Evil(marker)], dtype=object))
    with pytest.raises(RunError, match="not a readable"):
        read_trace(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_columns(path)
    assert not marker.exists()
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["step.npy"]


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../x", "/etc", "a/b", "a\\b", "a\x00", "a\nb", "~", "a" * 101, NASTY]
)
def test_a_name_cannot_leave_the_results_folder(tmp_path: Path, name: str) -> None:
    results = tmp_path / "results"
    Desk(results, make_config())
    (tmp_path / "search.json").write_bytes((results / "demo/search.json").read_bytes())
    with pytest.raises(SearchFolderError):
        SearchFolder.open(results, name)
    with pytest.raises(ValueError, match="must be 1 to 100 letters"):
        make_config(name=name)


@pytest.mark.parametrize("place", ["trials", "trials/0001", "trials/0000/x", "study.jsonl", "x"])
def test_links_inside_a_search_are_refused(tmp_path: Path, place: str) -> None:
    results, outside = tmp_path / "results", tmp_path / "outside"
    folder = Desk(results, make_config()).folder
    outside.mkdir()
    path = folder.root / place
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.symlink_to(outside, target_is_directory=True)
    with pytest.raises(SearchFolderError, match="is a link"):
        SearchFolder.open(results, "demo")
    for command in ("status", "sync", "resume", "best", "export"):
        found = CliRunner().invoke(app, [command, "demo", "--results-dir", str(results)])
        assert isinstance(found.exception, SearchFolderError)
    listed = CliRunner().invoke(app, ["status", "--results-dir", str(results)])
    assert "demo: cannot be read" in listed.output
    assert not list(outside.iterdir())


def test_a_new_search_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "results/demo").mkdir(parents=True)
    (tmp_path / "results/demo/trials").symlink_to(tmp_path / "outside")
    with pytest.raises(SearchFolderError, match="is a link"):
        SearchFolder.create(tmp_path / "results", make_config(), "")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a\\..\\x", "a\nb", ""])
def test_an_artifact_of_a_foreign_outbox_stays_inside(path: str) -> None:
    record = {"kind": "artifact", "trial": 0, "path": "a", "folder": "", "digest": "", "at": 1}
    from_payload(record)
    with pytest.raises(OutboxError, match="not a path inside"):
        from_payload({**record, "path": path})
    if path:
        with pytest.raises(OutboxError, match="not a path inside"):
            from_payload({**record, "folder": path})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's and SQLAlchemy's
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("", True),  # as it was copied
        ("file://{there}/7", True),
        ("file://{there}/mlflow/artifacts/../../7", True),
        ("file://{there}/mlflow/artifacts/%2e%2e/%2e%2e/7", True),
        ("file://{ours}/mlflow/artifacts/../../../there", True),
        ("{there}", True),
        ("file://{ours}/mlflow/artifacts/link", False),
        ("ftp://me@127.0.0.1:1/x", False),
    ],
)
def test_an_embedded_store_of_others_writes_no_file_elsewhere(
    address: str, inside: bool, tmp_path: Path
) -> None:
    MlflowStore.embedded(tmp_path / "theirs").ping()
    folder = Desk(tmp_path / "ours", make_config()).folder
    shutil.copytree(tmp_path / "theirs/mlflow", tmp_path / "ours/mlflow")
    there = tmp_path / "there"
    there.mkdir()
    artifacts = tmp_path / "ours/mlflow/artifacts"
    artifacts.mkdir()
    (artifacts / "link").symlink_to(there)
    if address:
        named = address.format(there=there, ours=tmp_path / "ours")
        with closing(sqlite3.connect(tmp_path / "ours/mlflow/mlflow.db")) as database, database:
            database.execute("UPDATE experiments SET artifact_location = ?", (named,))
    Outbox(folder.root).artifact(None, folder.root / "search.yaml")
    shipper = Shipper(
        folder.root, MlflowStore.embedded(tmp_path / "ours"), folder.search_id, "demo"
    )
    assert shipper.ship_once()
    assert shipper.status().refused == (0 if inside else 1)
    if not inside:
        refused = (folder.root / "refused.jsonl").read_text(encoding="utf-8")
        assert "not in this folder" in refused
    stored = [path for path in tmp_path.rglob("search.yaml") if path.parent != folder.root]
    assert [path.is_relative_to(artifacts) for path in stored] == [True] * inside


@pytest.mark.parametrize("place", ["mlflow", "mlflow/artifacts", "mlflow/mlflow.db"])
def test_an_embedded_store_that_is_a_link_is_not_opened(place: str, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    link = tmp_path / "ours" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "theirs")
    with pytest.raises(StoreOfflineError, match=f"{place}: is a link, .* tracking.uri"):
        MlflowStore.embedded(tmp_path / "ours").ping()
    assert not list((tmp_path / "theirs").iterdir())


@pytest.mark.parametrize("name", ["", "a/b", "a'b", 'a"b', "a\\b", "models:/a", NASTY])
def test_names_of_models_fit_a_filter(name: str) -> None:
    with pytest.raises(TrackingError, match="not allowed"):
        _plain(name)


def test_a_metric_cannot_end_a_filter() -> None:
    page = trials_page("http://h", "1", "run", "a` DESC; --'\"<script>")
    assert not set("`;'\"<>") & set(page.partition("orderByKey=metrics.%60")[2].replace("%60", ""))


def test_a_study_of_others_is_checked(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.run()
    assert len(desk.rows()) == 6
    good = desk.stored()[2].user_attrs["end"]
    endless = {**good, "metrics": {"val_accuracy": 10**400}}
    for damaged in ({**good, "reason": 5}, {**good, "metrics": [1]}, endless, [good]):
        edit_note(desk.folder, 2, "end", damaged)
        with pytest.raises(SearchFolderError, match="record of trial 2 is damaged"):
            desk.rows()


def test_what_a_terminal_would_obey_is_shown_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.yaml"
    for data in (
        yaml.safe_dump({NASTY: 1}),
        yaml.safe_dump({"name": NASTY}),
        f"? {NASTY}",
        f"a: {NASTY}",
        f"a: !{NASTY[:1]}\u202e x",
    ):
        file.write_text(data, encoding="utf-8")
        for command in ("check", "search", "train"):
            monkeypatch.setattr(sys, "argv", ["topotune", command, str(file)])
            with pytest.raises(SystemExit) as caught:
                main()
            assert caught.value.code == 2
            printed = capsys.readouterr()
            assert printed.err.startswith("error: ")
            assert controls(printed.out + printed.err) == []
    foreign = tmp_path / NASTY
    foreign.mkdir()
    (foreign / "search.json").write_text("{}", encoding="utf-8")
    found = CliRunner().invoke(app, ["status", "--results-dir", str(tmp_path)])
    assert "cannot be read" in found.output
    assert controls(found.output) == []


def test_a_description_is_no_markup(tmp_path: Path) -> None:
    text = "<script>alert(1)</script> | a\n# b `c` [x](javascript:1)"
    config = make_config(description=text)
    folder = SearchFolder.create(tmp_path, config, "")
    recorder = Recorder(folder, config)
    recorder.start({})
    recorder.close(leaderboard(folder, config), "COMPLETE", "")
    bodies = bodies_of(folder.root, None)
    notes = [b.tags["mlflow.note.content"] for b in bodies if isinstance(b, Tags)]
    head = notes[-1].split("\n\n")[2]
    assert head.startswith(r"\<script\>alert(1)\</script\> \| a")
    assert r"\[x\](javascript:1)" in head


PLUGIN = """
import pathlib, sys
sys.stderr.write("IMPORTED\\n")
pathlib.Path(__file__).with_name("owned").touch()
from tests.user_task import Rings as Theirs
"""


def test_an_import_path_runs_what_was_asked_for_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plug").mkdir()
    (tmp_path / "plug/__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "plug/theirs.py").write_text(PLUGIN, encoding="utf-8")
    config = make_config(task="plug.theirs:Theirs", objective=OBJECTIVE)
    desk = Desk(tmp_path / "results", config)
    desk.run()
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(as_file(config)), encoding="utf-8")
    results = ["--results-dir", str(tmp_path / "results")]
    for command in (["status", *results], ["status", "demo", *results], ["best", "demo", *results]):
        assert run(tmp_path, *command)[0] == 0
    assert run(tmp_path, "check", "--quick", "a.yaml")[0] == 0
    assert not (tmp_path / "plug/owned").exists()
    code, text = run(tmp_path, "check", "a.yaml")
    assert code == 0, text
    assert (tmp_path / "plug/owned").exists()
    note = f"note runs code of plug.theirs:Theirs from {tmp_path}/plug/theirs.py"
    assert text.count(note) == 1
    assert text.index(note) < text.index("IMPORTED")


OBJECTIVE = {"metric": "val_accuracy", "direction": "maximize"}


def as_file(config: SearchConfig) -> dict[str, Any]:
    wanted = ("name", "task", "method", "space", "objective", "budget", "sampler", "pruner")
    data: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    return {key: data[key] for key in wanted if key in data} | {"pruner": "none"}


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """A command in a process of its own, whose modules are fresh; its exit code and output."""
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "topotune", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_other_peoples_configs_name_their_place(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("task: digits\nmethod: adam\nepochs: 1\nseed: 1\nsurprise: 1\n")
    found = CliRunner().invoke(app, ["train", str(path)])
    assert isinstance(found.exception, ConfigError)
    assert "config.yaml:5: surprise: unknown key" in str(found.exception)
