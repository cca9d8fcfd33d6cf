"""What MLflow's pages say of searches: labels, links, the experiment's page, on a real server."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.search_cases import Desk, make_config
from topotune.records import EpochReport, Outcome, TrialSummary
from topotune.results.description import (
    CURVE_POINTS,
    LINKED_TRIALS,
    describe,
    describe_trial,
    figures,
)
from topotune.results.leaderboard import Leaderboard
from topotune.results.text import markdown
from topotune.search.drive.book import Progress
from topotune.search.drive.recorder import Recorder, budget_text, leaderboard, submitter
from topotune.search.place.folder import SearchFolder
from topotune.search.status import serve
from topotune.settings import TRACKING_URI
from topotune.tracking.entries import Metrics, Start, begun
from topotune.tracking.labels import Labels, trial_name
from topotune.tracking.mlflow import MlflowStore
from topotune.tracking.naming import MAX_TAG
from topotune.tracking.outbox import bodies_of
from topotune.tracking.pages import (
    _NOTE,
    NOTE_TAG,
    PAGE_TAG,
    VIEW_TAG,
    experiment_page,
    linked,
    page_tags,
    search_view,
)
from topotune.tracking.progress import PROGRESS_FILE
from topotune.tracking.serve import serve_dashboard, server_address
from topotune.tracking.shipper import Shipper
from topotune.tracking.store import StoreOfflineError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's and SQLAlchemy's

UP = "maximize"


def test_a_runs_name_begins_with_what_differs() -> None:
    row = TrialSummary(14, "COMPLETE", values=(0.94591, 1.5))
    assert trial_name(14, row.state, figures(row)) == "14 · 0.9459, 1.5000 · complete"
    pruned = TrialSummary(15, "PRUNED", curve={1: 0.5, 2: 0.25})
    assert trial_name(15, pruned.state, figures(pruned)) == "15 · 0.2500 · pruned"
    assert trial_name(16, "FAILED", figures(TrialSummary(16, "FAILED"))) == "16 · failed"


def test_a_trials_description_has_its_parameters_curve_and_config() -> None:
    row = TrialSummary(
        3,
        "COMPLETE",
        "",
        {"lr": 0.01, "coupling": "a_[b](c)|d"},
        values=(0.75,),
        curve={epoch: epoch / 100 for epoch in range(1, 76)},
        epochs=75,
        device_seconds=1.25,
        violated=("overhead_vs_adam: 3 > 2",),
        spec={"task": "digits", "train": {"batch_size": 32}},
    )
    text = describe_trial(row, {"val_accuracy": UP})
    shown = linked(text, lambda kind, number: f"#/{kind}/{number}")
    first, parameters, reason, *_ = shown.split("\n\n")
    assert first == (
        "**COMPLETE**, val_accuracy (maximize): 0.7500; 75 epochs, 1.2 device-seconds. "
        "[Curves](#/metrics/3), [files](#/files/3)"
    )
    assert parameters == "**lr** 0.01 · **coupling** a\\_\\[b\\](c)\\|d"
    assert reason == "overhead_vs_adam: 3 \\> 2"
    epochs = next(line for line in shown.splitlines() if line.startswith("| epoch"))
    assert epochs.split()[3] == "3"  # every fourth, back from the last
    assert epochs.split()[-2] == "75"
    assert len(epochs.split("|")) - 3 <= CURVE_POINTS
    config = shown.partition("```yaml\n")[2].removesuffix("\n```")
    assert yaml.safe_load(config) == row.spec
    failed = describe_trial(TrialSummary(4, "FAILED", "OSError: no"), {"val_accuracy": UP})
    assert failed.startswith("**FAILED**, val_accuracy (maximize): no value; 0 epochs")
    assert "OSError: no" in failed


def test_labels_come_from_the_first_record_of_a_search() -> None:
    tags = {"topotune.method": "tcep", "topotune.task": "digits", "topotune.user": "ada"}
    params = {"objective": "minimize val_loss, maximize val_accuracy", "searched": "lr, beta"}
    labels = Labels.of(Start(params, {**tags, "topotune.budget": "9 trials"}, 0))
    assert (labels.metrics, labels.maximize) == (("val_loss", "val_accuracy"), False)
    assert labels.searched == ("lr", "beta")
    assert labels.tags == {
        **tags,
        "mlflow.user": "ada",
        "mlflow.source.name": "tcep on digits (topotune)",
    }
    assert Labels.of(Start({}, {}, 0)) == Labels()


def test_links_lead_to_what_is_known_and_nothing_else() -> None:
    known = {("trial", 3): "#/3", ("trials", 0): "#/t"}
    text = "[best](topotune:trial/3), [old](topotune:trial/4), [all](topotune:trials) (topotune:x)"
    shown = linked(text, lambda kind, number: known.get((kind, number)))
    assert shown == "[best](#/3), old, [all](#/t) (topotune:x)"
    # What somebody else wrote makes no link: its brackets are escaped.
    foreign = markdown("[click](topotune:trial/3)")
    assert linked(foreign, lambda *_: "#/3") == foreign
    assert len(linked("[a](topotune:trials)\n" * 2000, lambda *_: "x" * 80)) <= MAX_TAG


def test_a_description_begins_with_the_outcome_and_keeps_within_a_tag() -> None:
    rows = [
        TrialSummary(i, "COMPLETE", params={"lr": 1e-3 * i}, values=(i / 300,)) for i in range(300)
    ]
    board = Leaderboard.of(rows, "s", {"m": UP})
    text = describe(board, "INTERRUPTED", "About | this. " * 300, "topotune resume s")
    first = text.partition("\n")[0]
    assert first.startswith("**INTERRUPTED**, best: [trial 299](topotune:trial/299), m 0.9967")
    assert "To go on: `topotune resume s`" in text
    assert text.count("(topotune:trial/") == LINKED_TRIALS + 1
    shown = linked(text, lambda kind, number: f"#/experiments/123456/runs/{number:032d}?w=" * 2)
    assert len(shown) < MAX_TAG
    assert shown.endswith("more trials are left out here.\n")
    assert "no trial has finished" in describe(Leaderboard.of([], "s", {"m": UP}), "RUNNING")


def test_an_experiments_page_is_written_once_and_never_over_somebody_elses() -> None:
    tags = page_tags({}, 7)
    views = [name for name in tags if name.startswith(VIEW_TAG)]
    assert len(views) == 3
    assert tags[NOTE_TAG] == _NOTE
    assert all(len(value) <= 5000 for value in tags.values())  # what older servers keep
    assert page_tags(tags, 8) == {}
    own = {**tags, NOTE_TAG: "Our group's experiment"}
    assert page_tags(own, 8) == {}
    del own[views[0]]  # deleted in the interface: stays so
    assert page_tags(own, 8) == {}
    # Of an experiment that people described before topotune came, the description stays.
    first = page_tags({NOTE_TAG: "Our group's experiment"}, 8)
    assert NOTE_TAG not in first
    assert set(first) == {*views, PAGE_TAG}
    # A newer version renews what the former one wrote, and what was changed since stays.
    older = {**tags, PAGE_TAG: tags[PAGE_TAG].replace("2 ", "1 ")}
    assert page_tags(older, 8)[NOTE_TAG] == _NOTE
    assert NOTE_TAG not in page_tags({**older, NOTE_TAG: "Edited"}, 8)
    assert page_tags({**tags, PAGE_TAG: "3 abc"}, 8) == {}  # by a newer topotune


def test_a_searchs_view_has_its_own_columns() -> None:
    labels = Labels(metrics=("val_loss",), maximize=False, searched=("lr", "model.hidden"))
    view = json.loads(search_view(labels, "abc"))
    assert view["searchFilter"] == "tags.mlflow.parentRunId = 'abc'"
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`val_loss`", True)
    assert {"params.`lr`", "params.`model.hidden`", "metrics.`val_loss`"} < {
        *view["selectedColumns"]
    }
    assert view["columnOrder"][:3] == ["attributes.`Run Name`", "metrics.`val_loss`", "params.`lr`"]
    charts = [chart["metricKey"] for chart in view["compareRunCharts"]]
    assert charts[:2] == ["val_loss", "train_loss"]
    assert len(json.dumps(view)) <= 5000  # what older servers keep of a tag
    assert "orderByKey" not in json.loads(search_view(Labels(), "abc"))


def test_budgets_are_told_in_one_form() -> None:
    assert budget_text(make_config()) == "6 trials, 4 epochs"
    timed = make_config(budget={"epochs": 2, "wall_clock": "2h", "device_seconds": 90})
    assert budget_text(timed) == "2 epochs, 7200 s, 90 device-s"


def test_who_submitted_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPOTUNE_USER", "ada")
    assert submitter() == "ada"
    monkeypatch.delenv("TOPOTUNE_USER")
    monkeypatch.setenv("LOGNAME", "grace")
    assert submitter() == "grace"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:s3cret-w0rd@mlflow.example:5000/team/", "https://mlflow.example:5000/team"),
        ("https://me:s3/cret@w0rd@mlflow.example", "https://mlflow.example"),
        ("http://mlflow.example?token=s3cret", "http://mlflow.example"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_a_servers_address_is_one_to_open(uri: str, shown: str) -> None:
    assert server_address(uri) == shown


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tracking server over SQLite, as several people share one."""
    with serve_dashboard(MlflowStore.embedded(tmp_path_factory.mktemp("server")), 0) as running:
        yield running.url


STATES = [Outcome.COMPLETE, Outcome.PRUNED, Outcome.DIVERGED, Outcome.FAILED]


def recorded(results: Path, name: str, user: str, method: str) -> SearchFolder:
    """What a driver and its workers write of a search that was stopped, without Ray."""
    config = make_config(name=name, method=method, budget={"trials": 4, "epochs": 2})
    folder = SearchFolder.create(results, config, "name: x\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOPOTUNE_USER", user)
        recorder = Recorder(folder, config)
        recorder.start({"topotune.method": method, "topotune.task": "digits"})
        recorder.recover([])
    rows = []
    for number, state in enumerate(STATES):
        value, at = 0.5 + 0.1 * number, time.time_ns() // 1_000_000
        start = begun({"lr": 0.1 * number}, {"version.topotune": "0"}, at)
        for epoch in (1, 2):
            at = time.time_ns() // 1_000_000
            report = EpochReport(epoch, epoch, {"val_accuracy": value}, 0.1, at)
            recorder.progress(number, Progress((report,), entries=(start,)))
        values = (value,) if state is Outcome.COMPLETE else ()
        why = "" if state is Outcome.COMPLETE else "because"
        rows.append(TrialSummary(number, state.value, why, {"lr": 0.1}, values, epochs=2))
        time.sleep(0.02)
        recorder.ended(rows[-1])
    board = Leaderboard.of(rows, name, {"val_accuracy": UP})
    recorder.close(board, "INTERRUPTED", "stopped by SIGINT")
    return folder


@pytest.fixture(scope="module")
def two_searches(
    server: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SearchFolder, SearchFolder]:
    """Two people's searches, sent at the same time to one experiment."""
    results = tmp_path_factory.mktemp("results")
    folders = (
        recorded(results, "hers", "ada", "adam"),
        recorded(results, "his", "alan", "topological_adam"),
    )
    counts = []

    def ship(folder: SearchFolder) -> None:
        shipper = Shipper(folder.root, MlflowStore(server), folder.search_id, folder.name)
        counts.append(shipper.close(120))

    threads = [threading.Thread(target=ship, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [count.complete for count in counts] == [True, True]
    return folders


@pytest.mark.heavy
def test_every_run_says_what_it_is(
    server: str, two_searches: tuple[SearchFolder, SearchFolder]
) -> None:
    store = MlflowStore(server)
    for folder, user, method in zip(
        two_searches, ("ada", "alan"), ("adam", "topological_adam"), strict=True
    ):
        runs = store.runs(folder.search_id)
        shared = {
            "topotune.search": folder.name,
            "topotune.method": method,
            "topotune.task": "digits",
            "topotune.model": "the task's own",
            "topotune.user": user,
            "mlflow.user": user,
            "mlflow.source.name": f"{method} on digits (topotune)",
        }
        assert len(runs) == 5
        for run in runs:
            assert run.tags.items() >= shared.items()
        parent = store.parent(folder.search_id)
        assert parent is not None
        wanted = {
            "topotune.outcome": "INTERRUPTED",
            "topotune.budget": "4 trials, 2 epochs",
            "topotune.counts": "1 complete, 1 pruned, 1 diverged, 1 failed",
            "topotune.best_trial": "0",
            "mlflow.runName": folder.name,
        }
        assert parent.tags.items() >= wanted.items()
        client = store.client()
        for number, state in enumerate(STATES):
            (run,) = store.runs(folder.search_id, number)
            assert run.tags["topotune.outcome"] == state
            value = " · 0.5000" if state is Outcome.COMPLETE else ""
            name = f"{number}{value} · {state.value.lower()}"
            assert client.get_run(run.run_id).info.run_name == run.tags["mlflow.runName"] == name
            info = client.get_run(run.run_id).info
            assert info.end_time - info.start_time >= 20  # it begins when its trial began


@pytest.mark.heavy
def test_every_link_of_a_search_leads_somewhere(
    server: str, two_searches: tuple[SearchFolder, SearchFolder]
) -> None:
    store, folder = MlflowStore(server), two_searches[0]
    parent = store.parent(folder.search_id)
    assert parent is not None
    note = parent.tags[NOTE_TAG]
    assert note.startswith("**INTERRUPTED**, best: [trial 0](#/experiments/")
    assert "topotune resume hers" in note
    assert "topotune:" not in note
    links = dict(re.findall(r"\[([^\]]+)\]\((#[^)]+)\)", note))
    runs = {run.run_id for run in store.runs(folder.search_id)}
    root = f"#/experiments/{store.experiment_id}/runs"
    for words, link in links.items():
        path, _, query = link.partition("?")
        fields = urllib.parse.parse_qs(query)
        if words in ("All trials as a table", "their curves"):
            assert ("compareRunsMode" in fields) == (words == "their curves")
            view = json.loads(store.experiment_tags()[VIEW_TAG + fields["viewStateShareKey"][0]])
            check_filter(store, view["searchFilter"], view["orderByKey"], 4)
        else:
            assert path.removeprefix(root + "/").removesuffix("/artifacts") in runs
    assert {"0", "1", "2", "3", "trial 0", "All trials as a table"} < set(links)


def check_filter(store: MlflowStore, query: str, order: str, expected: int) -> None:
    page = store.client().search_runs([store.experiment_id], query, order_by=[f"{order} DESC"])
    assert len(page) == expected, query


@pytest.mark.heavy
@pytest.mark.usefixtures("two_searches")
def test_the_experiment_explains_itself_with_filters_that_work(server: str) -> None:
    store = MlflowStore(server)
    tags = store.experiment_tags()
    assert tags[NOTE_TAG] == _NOTE
    rows = dict(re.findall(r"^\| ([^|]+) \| `([^`]+)` \|$", _NOTE, re.MULTILINE))
    found = {}
    for what, pattern in rows.items():
        query = pattern.replace("'NAME'", "'ada'" if "person" in what else "'hers'")
        query = query.replace("'tcep'", "'adam'")
        query = query.replace("20 trials, 9 epochs", "4 trials, 2 epochs")
        page = store.client().search_runs([store.experiment_id], query)
        found[what] = sorted(run.data.tags["mlflow.runName"] for run in page)
    assert {what: len(names) for what, names in found.items()} == {
        "the searches alone": 2,
        "one person's searches": 1,
        "searches that still run": 0,
        "the trials of a search": 4,
        "finished trials of a method": 1,
        "what diverged or failed": 4,
        "searches at equal budget": 2,
    }
    assert found["one person's searches"] == ["hers"]
    listed = [json.loads(tags[f"{VIEW_TAG}topotune-{key}"]) for key in ("searches", "wrong")]
    for view, expected in zip(listed, (2, 4), strict=True):
        state = json.loads(view["state"])
        check_filter(store, state["searchFilter"], state["orderByKey"], expected)


@pytest.mark.heavy
def test_what_people_write_on_an_experiment_stays(
    server: str, two_searches: tuple[SearchFolder, SearchFolder]
) -> None:
    store, folder = MlflowStore(server), two_searches[1]
    store.tag_experiment({NOTE_TAG: "Ours"})
    try:
        (folder.root / PROGRESS_FILE).unlink()
        again = Shipper(folder.root, store, folder.search_id, folder.name)
        assert again.ship_once()
        assert store.experiment_tags()[NOTE_TAG] == "Ours"
        parent = store.parent(folder.search_id)
        assert parent is not None
        assert parent.tags["topotune.outcome"] == "INTERRUPTED"
        # Sent again from its beginning, a trial that has ended does not run again.
        assert [
            store.runs(folder.search_id, number)[0].tags["topotune.outcome"] for number in range(4)
        ] == STATES
    finally:
        store.tag_experiment({NOTE_TAG: _NOTE})


@pytest.mark.heavy
def test_the_dashboard_of_a_tracking_server_is_its_address(
    server: str,
    two_searches: tuple[SearchFolder, SearchFolder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = two_searches[0]
    host = server.removeprefix("http://")
    monkeypatch.setenv(TRACKING_URI, f"http://ada:s3cret-w0rd@{host}")
    said: list[str] = []
    serve(folder.root.parent, "hers", 0, said.append)  # returns: nothing is served
    store = MlflowStore(server)
    parent = store.parent(folder.search_id)
    assert parent is not None
    experiment = store.experiment_id
    assert said[0] == f"MLflow: {experiment_page(server, experiment)}"
    assert said[1].startswith(f"hers: {server}/#/experiments/{experiment}/runs/{parent.run_id}?")
    assert said[2].endswith(f"viewStateShareKey={folder.search_id}")
    assert len(said) == 4
    assert "s3cret" not in " ".join(said)
    everything: list[str] = []
    serve(folder.root.parent, None, 0, everything.append)
    assert {"hers", "his"} <= {line.partition(":")[0] for line in everything}
    # Nor is a server asked to be ours where there are no searches at all.
    elsewhere: list[str] = []
    serve(folder.root.parent / "none", None, 0, elsewhere.append)
    assert elsewhere == said[:1]


@pytest.mark.heavy
def test_a_store_that_refuses_the_page_still_gets_the_records(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recorded(tmp_path, "third", "grace", "adam")
    store = MlflowStore(server)

    def refuse(_: object) -> None:
        raise StoreOfflineError("Permission denied")  # of a user who may add runs only

    monkeypatch.setattr(store, "tag_experiment", refuse)
    shipper = Shipper(folder.root, store, folder.search_id, folder.name)
    count = shipper.close(60)
    assert count.complete
    assert shipper.status().last_error == ""
    assert VIEW_TAG + folder.search_id not in store.experiment_tags()
    for run in store.runs(folder.search_id):
        store.client().delete_run(run.run_id)


def test_a_search_that_runs_has_a_description_and_keeps_its_submitter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOPOTUNE_USER", "ada")
    desk = Desk(tmp_path, make_config())
    first = Recorder(desk.folder, desk.config)
    first.start({})
    first.recover([])
    first.close(leaderboard(desk.folder, desk.config), "INTERRUPTED", "")
    monkeypatch.setenv("TOPOTUNE_USER", "grace")
    second = Recorder(desk.folder, desk.config)
    second.start({})
    desk.run()
    second.recover(desk.rows())
    try:
        assert second._outbox.tag("topotune.user") == "ada"
        assert second._outbox.tag("topotune.outcome") == "RUNNING"
        note = second._outbox.tag(NOTE_TAG) or ""
        assert note.startswith("**RUNNING**, best: [trial ")
        assert second._outbox.tag("topotune.counts") == "6 complete"
        points = [
            (body.step, body.values["best_val_accuracy"])
            for body in bodies_of(desk.folder.root, None)
            if isinstance(body, Metrics) and "best_val_accuracy" in body.values
        ]
        best: list[float] = []
        rows = sorted(desk.rows(), key=lambda row: row.number)
        for row in rows:
            best.append(max(row.values[0], *best[-1:]) if best else row.values[0])
        assert points == list(enumerate(best, start=1))
    finally:
        second.drop()
