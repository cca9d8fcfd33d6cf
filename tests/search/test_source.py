"""Which code a search ran: recorded with its results, asked about when it changed, and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.search_cases import Desk, make_config
from topotune.config.budget import Limits
from topotune.config.models import SearchConfig
from topotune.errors import ConfigError
from topotune.search.code.shipped import REPOSITORY_FILE
from topotune.search.code.source import (
    CODE_TAG,
    COMMAND_TAG,
    GIT_TAGS,
    Source,
    check_unchanged,
    code_differences,
    keep,
    other_differences,
    records,
    trial_starts,
)
from topotune.search.drive.book import Progress
from topotune.search.drive.recorder import Recorder
from topotune.search.place.folder import SearchFolder
from topotune.search.ray.worker import TrialActor, trial_config
from topotune.search.study.store import Handout
from topotune.tracking.outbox import Outbox

CONFIG = make_config(task="own_task:Task")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def user(tmp_path: Path) -> Path:
    root = tmp_path / "user"
    root.mkdir()
    (root / "own_task.py").write_text("import own_helper\n")
    (root / "own_helper.py").write_text("key = 'hunter2hunter2'\n")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> SearchFolder:
    return SearchFolder.create(tmp_path / "results", CONFIG, "")


def here(root: Path, config: SearchConfig = CONFIG) -> Source:
    return Source.here(config, root)


def names(folder: SearchFolder) -> set[str]:
    return {
        path.relative_to(folder.sources).as_posix()
        for path in folder.sources.rglob("*")
        if path.is_file()
    }


def test_the_code_of_a_session_is_kept_once_without_its_secrets(
    user: Path, folder: SearchFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWN_TOKEN", "hunter2hunter2")
    monkeypatch.setattr(
        sys, "argv", ["/x/bin/topotune", "search", "a b.yaml", "--x=hunter2hunter2"]
    )
    source = here(user)
    files = keep(folder, source)
    assert files[0] == folder.sources / "1/source.json"
    assert names(folder) == {"1/source.json", "1/code/own_task.py", "1/code/own_helper.py"}
    assert (folder.sources / "1/code/own_helper.py").read_text() == "key = '***'\n"
    record = json.loads(files[0].read_text())
    assert record["command"] == "topotune search 'a b.yaml' --x=***"
    assert record["hashes"] == source.hashes
    assert record["code"] == source.code
    assert source.search_tags[COMMAND_TAG] == record["command"]
    assert source.trial_tags == {CODE_TAG: source.code}

    assert keep(folder, here(user)) == files  # as it was
    (user / "own_task.py").write_text("import own_helper, json\n")
    again = keep(folder, here(user))
    assert [path.parent.name for path in again[:1]] == ["2"]
    assert sorted(records(folder)) == [1, 2]
    assert (folder.sources / "1/code/own_task.py").read_text() == "import own_helper\n"


def test_what_is_kept_is_what_was_hashed_and_the_right_file_is_named(
    user: Path, folder: SearchFolder
) -> None:
    source = here(user)
    (user / "own_task.py").write_text("import own_helper, task\n")  # before it could be kept
    (user / "task.py").write_text("")
    keep(folder, source)
    assert (folder.sources / "1/code/own_task.py").read_text() == "import own_helper\n"
    with pytest.raises(ConfigError) as caught:
        check_unchanged(folder, here(user))
    assert caught.value.place == str(user / "own_task.py")  # not task.py, whose name it contains


def test_a_search_of_built_in_parts_has_no_code_of_its_own(
    user: Path, folder: SearchFolder
) -> None:
    source = here(user, make_config())
    assert (source.code, source.hashes, source.trial_tags) == ("", {}, {})
    keep(folder, source)
    check_unchanged(folder, source)
    assert names(folder) == {"1/source.json"}


def test_a_command_in_another_folder_is_sent_to_where_the_code_lies(
    user: Path, folder: SearchFolder, tmp_path: Path
) -> None:
    keep(folder, here(user))
    with pytest.raises(ConfigError, match="is not found from") as caught:
        check_unchanged(folder, here(tmp_path))
    assert caught.value.fix == "Run the command in the folder that the code lies in"


def edit(user: Path) -> None:
    (user / "own_helper.py").write_text("key = 1\n")


def add(user: Path) -> None:
    (user / "own_helper.py").write_text("import own_more\n")
    (user / "own_more.py").write_text("")


def remove(user: Path) -> None:
    (user / "own_helper.py").unlink()


@pytest.mark.parametrize(
    ("change", "file", "words"),
    [
        (edit, "own_helper.py", "own_helper.py has changed"),
        (add, "own_helper.py", "own_helper.py has changed, own_more.py is new"),
        (remove, "own_helper.py", "own_helper.py is no longer imported"),
    ],
)
def test_changed_code_is_named_with_its_file_and_the_flag(
    change: Callable[[Path], None], file: str, words: str, user: Path, folder: SearchFolder
) -> None:
    check_unchanged(folder, here(user))  # a search that began before code was recorded
    keep(folder, here(user))
    check_unchanged(folder, here(user))
    change(user)
    with pytest.raises(ConfigError) as caught:
        check_unchanged(folder, here(user))
    text = str(caught.value)
    assert caught.value.place.endswith(file)
    assert f"{words}. They are kept in {folder.sources / '1' / 'code'}" in text
    assert "--changed-code" in text
    keep(folder, here(user))  # gone on with
    check_unchanged(folder, here(user))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"hashes": 3}', '{"hashes": {"a": "b"}}'])
def test_a_damaged_record_stops_nothing_else(damage: str, user: Path, folder: SearchFolder) -> None:
    keep(folder, here(user))
    (folder.sources / "1/source.json").write_text(damage)
    (folder.sources / "x").mkdir()
    (folder.sources / "x/source.json").write_text('{"hashes": {}}')
    if '"a"' in damage:
        with pytest.raises(ConfigError, match="a is no longer imported"):
            check_unchanged(folder, here(user))
    else:
        check_unchanged(folder, here(user))
    keep(folder, here(user))
    assert len(records(folder)) in (1, 2)
    check_unchanged(folder, here(user))


def test_the_repository_of_a_submitted_search_is_the_submitters(
    user: Path, folder: SearchFolder
) -> None:
    shipped = {"commit": COMMIT, "branch": "trunk", "url": "", "diff": "+ x\n"}
    (user / REPOSITORY_FILE).write_text(json.dumps(shipped))
    source = here(user)
    assert source.trial_tags == {
        CODE_TAG: source.code,
        GIT_TAGS[0]: COMMIT,
        GIT_TAGS[1]: "trunk",
        GIT_TAGS[3]: "true",
    }
    keep(folder, source)
    assert (folder.sources / "1/git.diff").read_text() == "+ x\n"
    record = records(folder)[1]
    assert record["git"] == {"commit": COMMIT, "branch": "trunk", "url": "", "dirty": True}
    (user / REPOSITORY_FILE).write_text("[1]")
    assert here(user).repository is None


def test_a_trial_says_which_code_it_ran_and_what_differs_is_named(
    user: Path, folder: SearchFolder
) -> None:
    first = here(user)
    keep(folder, first)
    assert trial_starts(folder, 0) == []
    Outbox(folder.root).start(0, {}, {"seed": "1"})  # as the driver begins it
    Outbox(folder.root).start(0, {}, {**first.trial_tags, "kernels": "AVX2"})
    starts = trial_starts(folder, 0)
    assert [start[CODE_TAG] for start in starts] == [first.code]
    assert code_differences(folder, starts, first.hashes) == []
    edit(user)
    kept = folder.sources / "1" / "code"
    assert code_differences(folder, starts, here(user).hashes) == [
        f"own_helper.py has changed (what it ran is kept in {kept})"
    ]
    Outbox(folder.root).start(0, {}, {CODE_TAG: "elsewhere"})  # goes on with other code
    words = code_differences(folder, trial_starts(folder, 0), first.hashes)
    assert words == [
        f"its epochs ran different code ({first.code}, elsewhere)",
        "the code (elsewhere, of which nothing is kept: edited during the search)",
    ]


def test_data_kernels_and_versions_that_differ_are_named() -> None:
    before = {
        "data.digest": "a",
        "kernels": "AVX2",
        "version.torch": "2.1",
        "host": "one",
        "x": "1",
    }
    now = {**before, "data.digest": "b", "version.torch": "2.2", "host": "one", "x": "2"}
    assert other_differences(before, now) == ["data was a, is b", "torch was 2.1, is 2.2"]
    assert other_differences(before, {**before, "kernels": "AVX512"}) == [
        "kernels was AVX2, is AVX512"
    ]
    assert other_differences({}, now) == []


def test_the_tag_of_a_trial_is_of_the_code_that_its_process_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is edited while the process lives changes nothing of what it runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = tmp_path / "own_blobs.py"
    module.write_text("from tests.train_cases import Blobs as Own\n")
    (tmp_path / REPOSITORY_FILE).write_text(
        json.dumps({"commit": COMMIT, "branch": "", "url": "", "diff": ""})
    )
    config = make_config(
        task="own_blobs:Own", budget={"trials": 2, "epochs": 1}, overhead={"blocks": 0}
    )
    desk = Desk(tmp_path / "results", config)
    desk.book.record = Recorder(desk.folder, config).progress
    tags = []
    for number in range(2):
        source = here(tmp_path, config)
        handout = desk.book.next()
        assert isinstance(handout, Handout)
        actor = TrialActor.__new__(TrialActor)
        config_of = trial_config(
            number, handout.spec, desk.folder.root, Limits(), tmp_path, source=source
        )
        actor.setup(config_of)
        desk.book.progress(number, Progress.from_json(actor.step()["payload"]))
        desk.book.end(number)
        actor.cleanup()
        tags.append((source.code, trial_starts(desk.folder, number)[-1]))
        module.write_text("from tests.train_cases import Blobs as Own  # edited\n")
    desk.store.close()
    (first, tags_0), (second, tags_1) = tags
    assert first != second
    assert (tags_0[CODE_TAG], tags_0.get(GIT_TAGS[0])) == (first, COMMIT)
    assert (tags_1[CODE_TAG], tags_1.get(GIT_TAGS[0])) == (first, None)


@pytest.mark.ray
@pytest.mark.heavy
@pytest.mark.timeout(400)
def test_a_real_search_whose_module_is_edited(tmp_path: Path) -> None:
    """Printed, edited, refused, gone on with, verified: as a user meets it."""
    user = tmp_path / "user"
    user.mkdir()
    (user / "own_scale.py").write_text("SCALE = 1.0\n")
    (user / "own_rings.py").write_text(
        "import os\nfrom own_scale import SCALE\nfrom tests.user_task import Rings\n\n\n"
        "class Own(Rings):\n"
        "    def prepare(self, inputs):\n"
        "        print('prepares', os.environ.get('OWN_TOKEN'))\n"
        "        return inputs * SCALE\n"
    )
    (user / "own.yaml").write_text(
        "name: own\ntask: {name: 'own_rings:Own', options: {points: 200}}\nmethod: adam\n"
        "space: {lr: {type: float, low: 1e-3, high: 1e-1, log: true}}\n"
        "objective: {metric: val_loss, direction: minimize}\npruner: none\n"
        "budget: {trials: 1, epochs: 2}\noverhead: {blocks: 0}\nresources: {concurrency: 1}\n"
    )
    root = str(Path(__file__).parents[2])

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        env = {**os.environ, "PYTHONPATH": root, "OWN_TOKEN": "hunter2hunter2"}
        done = subprocess.run(
            [sys.executable, "-m", "topotune", *arguments],
            cwd=user,
            env=env,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, done.stderr

    run("search", "own.yaml")
    folder = SearchFolder.open(user / "topotune-results", "own")
    record = records(folder)[1]
    assert set(record["hashes"]) == {
        "own_rings.py", "own_scale.py", "tests/__init__.py", "tests/user_task.py",
    }  # fmt: skip
    home = {path.name for path in folder.trial(0).iterdir()}
    assert not home & {"crash.txt", "guard.txt", "hang.txt"}
    printed, _ = run("logs", "own", "--trial", "0")
    assert set(printed.splitlines()) == {"prepares ***"}

    (user / "own_scale.py").write_text("SCALE = 3.0\n")
    said, _ = run("resume", "own")
    assert "finished, nothing is left to do" in said  # no code runs, whatever it is
    _, error = run("extend", "own", "--trials", "1", code=2)
    assert f"{user / 'own_scale.py'}: the code of search 'own' is not" in error
    assert "--changed-code" in error
    assert folder.config().budget.trials == 1  # nothing was written
    run("extend", "own", "--trials", "1", "--changed-code")
    codes = [trial_starts(folder, number)[-1][CODE_TAG] for number in (0, 1)]
    assert codes == [record["code"], records(folder)[2]["code"]]
    data = [trial_starts(folder, number)[-1]["data.digest"] for number in (0, 1)]
    assert data[0] == data[1]

    (user / "own_scale.py").write_text("SCALE = 9.0\n")
    _, error = run("export", "own", "--verify", code=1)
    assert "own_scale.py has changed (what it ran is kept in" in error
    assert "Not as it was recorded: own_scale.py has changed" in error
