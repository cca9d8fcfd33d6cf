"""What MLflow's pages show of searches: addresses in its interface, and the experiment's own page.

An experiment holds the searches of many people, whose shippers may all be at work at once. What is
written on it is therefore the same text from everybody, written once a version of topotune and
never over somebody's own; only the table of one search belongs to that search alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from topotune.tracking.labels import Labels
from topotune.tracking.naming import clean_name, clean_tag
from topotune.tracking.store import PARENT_TAG, ROLE_TAG

NOTE_TAG = "mlflow.note.content"
"""MLflow's tag of a description, in Markdown, of a run and of an experiment alike."""
PAGE_TAG = "topotune.page"
"""Says on an experiment which version of its page is written, and the description's digest."""
VIEW_TAG = "mlflow.sharedViewState."
"""How MLflow's interface keeps a view (columns, filter, order) that is shared by a link."""

_VIEW = "workflowType=machine_learning"
_LINK = re.compile(r"(?<!\\)\[((?:\\.|[^\\\[\]])*)\]\(topotune:([a-z]+)(?:/([0-9]+))?\)")
_PAGE_VERSION = 2
_OVERHEADS = ("overhead_vs_adam", "overhead_vs_bptt")
"""What a step costs; a column that no trial of a search has is not shown."""

_NOTE = """\
**Searches by topotune: one run a search, its trials nested below it; a trial's name gives its \
number, its objectives and how it ended.** The menu *Views* has ready tables; open this text for \
filters to paste.

Open a search's run for its leaderboard and links. To narrow the table, paste into the search box:

| what | filter |
| :--- | :--- |
| the searches alone | `tags.topotune.role = 'search'` |
| one person's searches | `tags.topotune.role = 'search' and tags.topotune.user = 'NAME'` |
| searches that still run | `tags.topotune.role = 'search' and tags.topotune.outcome = 'RUNNING'` |
| the trials of a search | `tags.topotune.role = 'trial' and tags.topotune.search = 'NAME'` |
| finished trials of a method | `tags.topotune.outcome = 'COMPLETE' and \
tags.topotune.role = 'trial' and tags.topotune.method = 'tcep'` |
| what diverged or failed | `tags.topotune.role = 'trial' and tags.topotune.outcome != 'COMPLETE' \
and tags.topotune.outcome != 'PRUNED' and tags.topotune.outcome != 'RUNNING'` |
| searches at equal budget | `tags.topotune.role = 'search' and tags.topotune.task = 'digits' and \
tags.topotune.budget = '20 trials, 9 epochs'` |

`topotune.outcome` of a trial is COMPLETE, PRUNED (stopped early as too weak), DIVERGED (left the \
finite numbers) or FAILED, with the cause in `topotune.reason`; of a search COMPLETE, INTERRUPTED \
(can be resumed) or FAILED; RUNNING before that. MLflow's own status is KILLED for PRUNED. \
`objective` and `searched` among a search's parameters say what it optimises and what it varies.
"""


def run_page(base_url: str, experiment_id: str, run_id: str, tab: str = "") -> str:
    """The page of one run, a search's own or a trial's, in the interface for training.

    Args:
        base_url: the server's address; empty for one relative to any of its pages.
        experiment_id: MLflow's id of the experiment.
        run_id: the run.
        tab: "artifacts" or "model-metrics" (the curves) for that part of it.
    """
    end = f"/{tab}" if tab else ""
    return f"{_root(base_url)}/experiments/{experiment_id}/runs/{run_id}{end}?{_VIEW}"


def experiment_page(base_url: str, experiment_id: str, view: str = "", charts: bool = False) -> str:
    """The experiment's table of runs; with a view's key in that view, as charts if wanted."""
    shared = f"&viewStateShareKey={view}" if view else ""
    shared += "&compareRunsMode=CHART" if charts else ""
    return f"{_root(base_url)}/experiments/{experiment_id}/runs?{_VIEW}{shared}"


def trials_page(
    base_url: str, experiment_id: str, parent_id: str, metric: str = "", maximize: bool = True
) -> str:
    """The experiment's table of runs, narrowed to the trials of one search.

    Args:
        base_url: the server's address; empty for one relative to any of its pages.
        experiment_id: MLflow's id of the experiment.
        parent_id: the run of the search itself.
        metric: sort by its last value, best first, with all curves beside the table; without it
            MLflow folds the trials into their parent's row.
        maximize: whether the highest value is the best.
    """
    query = {"searchFilter": _trials_of(parent_id)}
    if metric:
        order = "false" if maximize else "true"
        query |= {"orderByKey": f"metrics.`{clean_name(metric)}`", "orderByAsc": order}
        query["compareRunsMode"] = "CHART"
    text = urllib.parse.urlencode(query, quote_via=urllib.parse.quote)
    return f"{experiment_page(base_url, experiment_id)}&{text}"


def linked(text: str, address: Callable[[str, int], str | None]) -> str:
    """A description whose ``[words](topotune:KIND/NUMBER)`` became links, or words where there is
    nothing to link to; within the length of a tag.

    Args:
        text: Markdown as it was recorded, when no run had an id yet.
        address: gives the address of a kind and number (0 without one).
    """

    def link(match: re.Match[str]) -> str:
        target = address(match[2], int(match[3] or 0))
        return match[1] if target is None else f"[{match[1]}]({target})"

    return clean_tag(_LINK.sub(link, text))


def page_tags(known: Mapping[str, str], now_ms: int) -> dict[str, str]:
    """The tags that an experiment's page still needs: its description and its listed views.

    Nothing where this version of the page, or a newer one, was written before, so that what people
    changed or deleted since stays so; a description is replaced only if it is the former one.

    Args:
        known: the experiment's tags.
        now_ms: Unix milliseconds; MLflow lists views by their age.
    """
    version, _, digest = known.get(PAGE_TAG, "").partition(" ")
    if version.isdecimal() and int(version) >= _PAGE_VERSION:
        return {}
    tags = {f"{VIEW_TAG}{key}": _listed(name, view, now_ms) for key, (name, view) in _VIEWS.items()}
    note = known.get(NOTE_TAG, "")
    if not note.strip() or _digest(note) == digest:
        tags[NOTE_TAG] = _NOTE
    return {**tags, PAGE_TAG: f"{_PAGE_VERSION} {_digest(_NOTE)}"}


def search_view(labels: Labels, parent_id: str) -> str:
    """The trials of one search, best first: a table of its objectives, what is searched and what
    it cost, and charts that begin with the objectives.

    MLflow sorts columns by kind and name where a view does not order them, and charts by name.
    """
    columns = [_column("metrics", clean_name(name)) for name in labels.metrics]
    columns += [_column("params", clean_name(name)) for name in labels.searched]
    spreads = (f"{name}{part}" for name in _OVERHEADS for part in ("", "_iqr"))
    costs = (*spreads, "device_seconds", "epochs_trained")
    columns += [_column("metrics", name) for name in costs]
    columns += [_column("tags", "topotune.outcome"), _column("attributes", "Dataset")]
    view: dict[str, Any] = {
        "searchFilter": _trials_of(parent_id),
        "selectedColumns": columns,
        "columnOrder": [_column("attributes", "Run Name"), *columns],
    }
    if labels.metrics:
        view |= _charts([*labels.metrics, "train_loss", *_OVERHEADS])
        order = _column("metrics", clean_name(labels.metrics[0]))
        view |= {"orderByKey": order, "orderByAsc": not labels.maximize}
    return json.dumps(view)


def _charts(metrics: Sequence[str]) -> dict[str, Any]:
    """Charts in this order, before those that MLflow adds for the other metrics.

    A chart is written as the bar of a last value; MLflow 3.17 makes a line of it where the metric
    has several steps.
    """
    section = "topotune"
    charts = [
        {"type": "BAR", "uuid": f"{section}-{i}", "metricSectionId": section, "metricKey": name}
        | {"displayName": name, "isGenerated": True, "deleted": False}
        for i, name in enumerate(map(clean_name, dict.fromkeys(metrics)))
    ]
    names = ("Model metrics", "System metrics")
    sections = [
        {"uuid": uuid, "name": name, "display": uuid == section, "isReordered": True}
        for uuid, name in zip((section, "system"), names, strict=True)
    ]
    return {"compareRunCharts": charts, "compareRunSections": sections}


def _root(base_url: str) -> str:
    return f"{base_url}/#" if base_url else "#"


def _trials_of(parent_id: str) -> str:
    return f"tags.{PARENT_TAG} = '{parent_id}'"


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"


def _view(where: str, order: str, names: str) -> dict[str, Any]:
    columns = [_column(*name.split(".", 1)) for name in names.split()]
    return {"searchFilter": where, "orderByKey": order, "selectedColumns": columns}


def _listed(name: str, view: Mapping[str, Any], now_ms: int) -> str:
    """A view in the form that MLflow 3.17 lists in its menu; an older one ignores it."""
    state = json.dumps({**view, "orderByAsc": False})
    return json.dumps({"name": name, "createdAt": now_ms, "updatedAt": now_ms, "state": state})


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


_COMMON = "tags.topotune.outcome tags.topotune.method tags.topotune.task attributes.User"
_VIEWS = {
    "topotune-searches": (
        "topotune: searches",
        _view(
            f"tags.{ROLE_TAG} = 'search'",
            "attributes.start_time",
            f"{_COMMON} tags.topotune.budget tags.topotune.counts tags.topotune.best_trial "
            "metrics.best_val_accuracy metrics.device_seconds",
        ),
    ),
    "topotune-finished": (
        "topotune: finished trials, best val_accuracy first",
        _view(
            f"tags.{ROLE_TAG} = 'trial' and tags.topotune.outcome = 'COMPLETE'",
            _column("metrics", "val_accuracy"),
            f"{_COMMON} tags.topotune.search metrics.val_accuracy metrics.val_loss "
            "metrics.overhead_vs_adam metrics.overhead_vs_adam_iqr metrics.overhead_vs_bptt "
            "metrics.overhead_vs_bptt_iqr metrics.device_seconds",
        ),
    ),
    "topotune-wrong": (
        "topotune: diverged and failed trials",
        _view(
            f"tags.{ROLE_TAG} = 'trial' and tags.topotune.outcome != 'COMPLETE' "
            "and tags.topotune.outcome != 'PRUNED' and tags.topotune.outcome != 'RUNNING'",
            "attributes.start_time",
            f"{_COMMON} tags.topotune.search tags.topotune.reason tags.host",
        ),
    ),
}
"""Key to name and content of the views in the experiment's menu."""
