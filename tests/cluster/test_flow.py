"""Two users on one cluster, by name from their own machines: submit, watch, lose a node, stop,
resume, export; and who is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.cluster.test_run import answer, end, free_port
from tests.cluster_files import ROOT
from tests.flow_site import Client, OneMachine, audit, epochs_of, finish, until
from tests.postgres import installed
from topotune.config.file import load_spec

pytestmark = [pytest.mark.cluster_full, pytest.mark.timeout(900)]

TRIALS, EPOCHS, SECONDS = 6, 6, 10.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[OneMachine]:
    if not installed():
        pytest.skip("PostgreSQL's server (initdb, postgres) is not installed")
    with TemporaryDirectory(prefix="tt-") as folder, OneMachine(Path(folder)) as one:
        yield one


def client(cluster: OneMachine, folder: Path, user: str) -> Client:
    return Client(folder / user, cluster.access, user)


def test_a_job_of_another_version_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "topotune", "--on-cluster", "9.9.9", "status"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "version 9.9.9 sent this job" in done.stderr
    assert "Install the same version" in done.stderr


def test_a_cluster_that_asks_nobody_is_refused_unless_that_is_accepted(tmp_path: Path) -> None:
    jobs = free_port()
    with TemporaryDirectory(prefix="tt-") as folder, (tmp_path / "log").open("wb") as log:
        # Open to nobody else either: a loopback address of its own.
        head = subprocess.Popen(
            [Path(sys.executable).parent / "ray", "start", "--head", "--block",
             "--disable-usage-stats", f"--temp-dir={folder}", f"--port={free_port()}",
             f"--ray-client-server-port={free_port()}", f"--node-ip-address=127.0.{jobs % 200}.9",
             f"--dashboard-agent-listen-port={free_port()}", "--dashboard-host=127.0.0.1",
             f"--dashboard-port={jobs}", "--num-cpus=1"],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": folder,
                 "TOPOTUNE_PYTHON": sys.executable,
                 "RAY_AUTH_MODE": "disabled", "TOPOTUNE_STORAGE": str(tmp_path / "results")},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{jobs}"
            until(lambda: answer(f"{address}/api/version") == 200, 120, "the dashboard answers")
            user = Client(tmp_path / "user", {"TOPOTUNE_ADDRESS": address}, "user")
            for words in (["list"], ["submit", user.search("open", 1, 1, 0.1)]):
                code, line = user.fails(*words)
                assert code == 2
                assert "takes jobs, which run any code, from anybody" in line
                assert "--allow-open" in line
            time.sleep(3)  # its agent, which starts jobs, comes a little later
            assert user.run("list", "--allow-open", "--json").strip() == "[]"
        finally:
            end(head)


def test_two_searches_of_two_users_a_lost_node_a_stop_and_a_resume(
    cluster: OneMachine, tmp_path: Path
) -> None:
    ada, bob = client(cluster, tmp_path, "ada"), client(cluster, tmp_path, "bob")
    eve = client(cluster, tmp_path, "eve")  # submits nothing, looks on
    hurry = cluster.root / "hurry"
    begun = [
        one.start("submit", one.search(f"of-{one.user}", TRIALS, EPOCHS, SECONDS, hurry))
        for one in (ada, bob)
    ]
    for process in begun:
        assert "This machine is no longer needed" in finish(process)

    # Side by side, each with a part of the cluster; seen from elsewhere.
    def sharing() -> bool:
        states = [eve.status(f"of-{user}")["live"] for user in ("ada", "bob")]
        print(states)  # for whoever reads a failure
        return all(live and live["running"] for live in states)

    until(sharing, 120, "trials of both at once")
    seen = eve.list()
    assert {name: row["user"] for name, row in seen.items()} == {"of-ada": "ada", "of-bob": "bob"}
    assert {row["state"] for row in seen.values()} == {"running"}
    assert {row["job_status"] for row in seen.values()} == {"RUNNING"}

    # A node without its power: what is left goes on there, less than before for both.
    cluster.kill("worker-2")
    before = progress(cluster)
    until(
        lambda: all(now > then for now, then in zip(progress(cluster), before, strict=True)),
        90,
        "both went on",
    )
    assert {row["state"] for row in eve.list().values()} == {"running"}
    cluster.script("up")
    assert "worker-2 runs" in cluster.script("status")

    # A stop from another terminal loses nothing; whoever resumes has the code of who submitted.
    kept = recorded(cluster, "of-bob")
    assert sum(map(len, kept)) < TRIALS * EPOCHS, "too late to stop it"
    said = bob.run("stop", "of-bob")
    assert "of-bob: STOPPED" in said
    stopped = eve.list()["of-bob"]
    assert (stopped["state"], stopped["job_status"]) == ("stopped", "STOPPED")
    after = recorded(cluster, "of-bob")
    assert all(now[: len(then)] == then for now, then in zip(after, kept, strict=True))
    assert eve.list()["of-ada"]["state"] == "running"
    hurry.touch()
    assert "begun" in eve.run("resume", "of-bob")
    assert recorded(cluster, "of-bob")[0][: len(after[0])] == after[0]

    for one in (ada, bob):
        check_finished(cluster, one, eve, f"of-{one.user}")
    assert eve.list()["of-bob"]["user"] == "eve"  # who drove it last


def check_finished(cluster: OneMachine, one: Client, eve: Client, name: str) -> None:
    """Wait for a search's end; its trials, its epochs, its runs and its export are all there."""
    until(lambda: eve.list()[name]["job_status"] == "SUCCEEDED", 240, f"{name} has ended")
    status = one.status(name)
    audit(cluster.results, status, TRIALS, EPOCHS)
    counted = eve.run("sync", name).split()
    assert counted[counted.index("items") - 1] == counted[counted.index("stored") - 1], counted
    one.run("export", name, "--top", "2")
    configs = sorted((one.folder / "topotune-exports" / name).glob("rank-*/config.yaml"))
    assert len(configs) == 2
    for config, row in zip(configs, status["trials"], strict=False):
        spec = load_spec(config)
        assert spec.task == "paced_rings:Paced"
        assert dict(spec.params) == row["params"]
    drawn = f"topotune-plots/{name}/trial-0000/trace.png"
    assert one.run("plot", name, "--trial", "0") == f"{drawn}\n"
    assert (one.folder / drawn).read_bytes().startswith(b"\x89PNG")
    assert f"trial {status['trials'][0]['number']}:" in one.run("best", name)
    job = eve.list()[name]["job"]
    assert f"{name}: finished; " in eve.run("resume", name)
    assert eve.list()[name]["job"] == job  # no driver was started to do nothing


def recorded(cluster: OneMachine, name: str) -> list[list[int]]:
    """The recorded epochs of each trial."""
    return [epochs_of(cluster.results / name, number) for number in range(TRIALS)]


def progress(cluster: OneMachine) -> list[int]:
    """Epochs recorded by each of the two searches."""
    return [sum(map(len, recorded(cluster, name))) for name in ("of-ada", "of-bob")]


def test_who_has_no_or_another_token_is_refused_and_starts_nothing(
    cluster: OneMachine, tmp_path: Path
) -> None:
    user = client(cluster, tmp_path, "user")
    file = user.search("refused", 1, 1, 0.1)
    for words in (["list"], ["status", "x"], ["submit", file], ["stop", "x"], ["doctor"]):
        code, line = user.fails(*words, RAY_AUTH_TOKEN="0" * 64)
        assert code == 2
        assert "does not accept the token of RAY_AUTH_TOKEN" in line
        code, line = user.fails(*words, RAY_AUTH_TOKEN="")
        assert code == 2
        assert "asks for a token, and there is none here" in line
        assert "RAY_AUTH_TOKEN_PATH" in line  # what to do
    assert "refused" not in user.list()
    assert not (cluster.results / "refused").exists()


def test_what_is_wrong_on_the_cluster_only_is_told_here(
    cluster: OneMachine, tmp_path: Path
) -> None:
    user = client(cluster, tmp_path, "user")
    text = (user.folder / user.search("unread", 1, 1, 0.1)).read_text(encoding="utf-8")
    task = 'task: {name: cifar10, data_dir: "/proc/nowhere"}'  # that nobody can make
    lines = [task if line.startswith("task:") else line for line in text.splitlines()]
    (user.folder / "unread.yaml").write_text("\n".join(lines), encoding="utf-8")
    code, line = user.fails("submit", "unread.yaml")
    assert code == 2
    assert "data folder /proc/nowhere: cannot be written" in line
    file = user.search("taken", 1, 1, 0.1)
    user.run("submit", file)
    until(lambda: user.list()["taken"]["job_status"] == "SUCCEEDED", 120, "it has ended")
    code, line = user.fails("submit", file)
    assert code == 2
    assert "taken" in line
    assert "--name" in line
    assert user.run("logs", "taken", "--trial", "0") == "trial 0 of taken has printed nothing\n"
    module = user.folder / "paced_rings.py"
    module.write_text(module.read_text(encoding="utf-8") + "\nprint('of the new code')\n")
    user.run("extend", "taken", "--trials", "1")  # with the code that it was submitted with
    until(lambda: user.list()["taken"]["job_status"] == "SUCCEEDED", 120, "it has ended again")
    assert user.run("logs", "taken", "--trial", "1") == "trial 1 of taken has printed nothing\n"
    user.run("extend", "taken", "--trials", "1", "--changed-code")
    until(lambda: user.list()["taken"]["job_status"] == "SUCCEEDED", 120, "it has ended again")
    assert user.run("logs", "taken", "--trial", "2") == "of the new code\n"
    assert user.fails("logs", "taken", "--trial", "9")[0] == 2
    code, line = user.fails("resume", "never-was")
    assert code == 2
    assert "never-was" in line
