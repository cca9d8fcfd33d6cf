"""Sends records of one run to the store, in batches; a run is made when it is first needed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from topotune.errors import OutboxError, RunError, TrackingError
from topotune.records import DATA_TAG, ROWS_TAG, Outcome
from topotune.tracking.entries import (
    INTERRUPTED,
    OUTCOME_TAG,
    RUNNING,
    Artifact,
    End,
    Entry,
    Item,
    Start,
    items,
)
from topotune.tracking.labels import TASK, Labels, short, trial_name
from topotune.tracking.naming import clean_text
from topotune.tracking.pages import (
    NOTE_TAG,
    VIEW_TAG,
    experiment_page,
    linked,
    page_tags,
    run_page,
    search_view,
)
from topotune.tracking.progress import Progress, Refused
from topotune.tracking.store import NewRun, Store, StoreRefusedError

MAX_BATCH = 1000
MAX_TEXTS = 100
MAX_BYTES = 800_000
_PAGE_TRIES = 3
_log = logging.getLogger(__name__)

_STATUS = {
    Outcome.COMPLETE.value: "FINISHED",
    Outcome.PRUNED.value: "KILLED",
    Outcome.DIVERGED.value: "FAILED",
    Outcome.FAILED.value: "FAILED",
    INTERRUPTED: "KILLED",
}
"""MLflow's status of each outcome. KILLED is its word for what was stopped from outside. FINISHED
shows a green tick, which a trial that was given up has not earned; the name and the tag
``topotune.outcome`` tell PRUNED from INTERRUPTED."""


@dataclass(frozen=True)
class Source:
    """An item and the offset in the outbox that it came from."""

    offset: int
    item: Item


class Delivery:
    """Knows the runs of one search in one store and fills them from its outbox."""

    def __init__(
        self,
        folder: Path,
        store: Store,
        search_id: str,
        name: str,
        progress: Progress,
        refused: Refused,
    ) -> None:
        self._folder = folder.resolve()
        self._store = store
        self._search_id = search_id
        self._name = clean_text(name, 250)
        self._progress = progress
        self._refused = refused
        self._labels: Labels | None = None
        self._data: set[str] = set()
        self._page_tries = _PAGE_TRIES

    def send(self, entries: Sequence[tuple[int, Entry]]) -> None:
        """Send (offset, record) pairs of one run, in their order.

        Raises:
            StoreOfflineError, RunMissingError: nothing may be assumed about what has arrived;
                sending all of it again is harmless.
            OutboxError: what was refused cannot be written down.
        """
        newest = {
            (entry.body.path, entry.body.folder): offset
            for offset, entry in entries
            if isinstance(entry.body, Artifact)
        }
        trial = entries[0][1].trial
        run_id = self.run(trial, entries[0][1].at)
        batch: list[Source] = []
        for offset, entry in entries:
            body = entry.body
            if isinstance(body, Start):
                self._reopen(trial, run_id, body)
                self._say_data(run_id, body)
            batch += [Source(offset, item) for item in self._items(entry)]
            if isinstance(body, Artifact):
                if newest[body.path, body.folder] == offset:
                    self._upload(offset, run_id, body)
            elif isinstance(body, End):
                self._flush(run_id, batch)
                batch = []
                self._end(offset, run_id, body)
                self._progress.ended[_key(trial)] = body.at
        self._flush(run_id, batch)
        if trial is None and self._page_tries:
            self._renew_page()

    def _items(self, entry: Entry) -> Iterator[Item]:
        """The items of a record, with what only the store's side knows."""
        ended = _key(entry.trial) in self._progress.ended
        for item in items(entry):
            if item.kind == "tag" and item.key == NOTE_TAG:
                yield replace(item, value=linked(str(item.value), self._address))
            elif not (ended and item.key == OUTCOME_TAG and isinstance(entry.body, Start)):
                yield item  # the end that is known came after this beginning

    def _address(self, kind: str, number: int) -> str | None:
        """Where a link of a description leads, relative to the server's pages; None: nowhere."""
        runs, experiment = self._progress.runs, self._store.experiment_id
        match kind:
            case "trial" | "metrics" | "files":
                tab = {"metrics": "model-metrics", "files": "artifacts"}.get(kind, "")
                run_id = runs.get(str(number))
                return None if run_id is None else run_page("", experiment, run_id, tab)
            case "trials":
                return experiment_page("", experiment, self._search_id)
            case "artifacts":
                return run_page("", experiment, runs["search"], "artifacts")
            case "curves":
                return experiment_page("", experiment, self._search_id, charts=True)
        return None

    def _known_labels(self) -> Labels:
        if self._labels is None:
            self._labels = Labels.read(self._folder)
        return self._labels

    def _renew_page(self) -> None:
        """Bring the experiment's page up to date; a store that will not have it keeps its own."""
        self._page_tries -= 1
        key = VIEW_TAG + self._search_id
        for _ in range(2):  # the shipper of another search may write the same tags at this moment
            try:
                known = self._store.experiment_tags()
                view = search_view(self._known_labels(), self.run(None, 0))
                own = {} if known.get(key) == view else {key: view}
                tags = own | page_tags(known, time.time_ns() // 1_000_000)
                if tags:
                    self._store.tag_experiment(tags)
                self._page_tries = 0
                return
            except (RunError, TrackingError, OutboxError) as error:
                _log.info("the page of the experiment is not renewed: %s", error)

    def run(self, trial: int | None, at: int) -> str:
        """The run of a trial or of the search: remembered, else found by its tags, else made."""
        runs = self._progress.runs
        key = _key(trial)
        if key not in runs:
            if trial is None:
                found = self._store.parent(self._search_id)
            else:
                found = next(iter(self._store.runs(self._search_id, trial)), None)
            if found is not None:
                runs[key] = found.run_id
            else:
                labels = self._known_labels()
                name = self._name if trial is None else trial_name(trial, RUNNING)
                parent = None if trial is None else self.run(None, labels.began or at)
                new = NewRun(self._search_id, trial, name, at, parent, labels.tags)
                runs[key] = self._store.create_run(new)
        return runs[key]

    def _reopen(self, trial: int | None, run_id: str, start: Start) -> None:
        ended = self._progress.ended.get(_key(trial))
        if ended is not None and start.at > ended:
            with suppress(StoreRefusedError):  # deleted by hand: its items are refused as well
                self._store.reopen(run_id)
            del self._progress.ended[_key(trial)]

    def _say_data(self, run_id: str, start: Start) -> None:
        """Make a dataset input of a trial's tags, for its run and, once for each, the search's."""
        digest = start.tags.get(DATA_TAG)
        if digest is None:
            return
        name = short(self._known_labels().tags.get(TASK, "")) or "data"
        runs = [run_id] if digest in self._data else [run_id, self.run(None, start.at)]
        for one in runs:
            with suppress(StoreRefusedError):  # the tags say it, too
                self._store.log_data(one, name, digest, start.tags.get(ROWS_TAG, ""))
        self._data.add(digest)

    def _upload(self, offset: int, run_id: str, artifact: Artifact) -> None:
        item = Item("artifact", artifact.path, artifact.folder)
        path = (self._folder / artifact.path).resolve()
        if not path.is_relative_to(self._folder) or not path.is_file():
            self._refused.add(offset, item, "no such file inside the search folder")
            return
        try:
            self._store.log_artifact(run_id, path, artifact.folder)
        except StoreRefusedError as error:
            self._refused.add(offset, item, str(error))

    def _end(self, offset: int, run_id: str, end: End) -> None:
        try:
            self._store.terminate(run_id, _STATUS[end.outcome], end.at)
        except StoreRefusedError as error:
            self._refused.add(offset, Item("end", end.outcome, ""), str(error))

    def _flush(self, run_id: str, sources: list[Source]) -> None:
        for batch in _batches(_newest_texts(sources)):
            self._log(run_id, batch)

    def _log(self, run_id: str, batch: Sequence[Source]) -> None:
        """Send one batch; where it is refused, halve it until the items to blame stand alone."""
        try:
            self._store.log(run_id, [source.item for source in batch])
        except StoreRefusedError as error:
            if len(batch) == 1:
                self._refused.add(batch[0].offset, batch[0].item, str(error))
                return
            half = len(batch) // 2
            self._log(run_id, batch[:half])
            self._log(run_id, batch[half:])


def _key(trial: int | None) -> str:
    return "search" if trial is None else str(trial)


def _newest_texts(sources: Sequence[Source]) -> list[Source]:
    """Each tag once, with its newest value: a batch must not hold a key twice."""
    newest = {s.item.key: s for s in sources if s.item.kind == "tag"}
    return [s for s in sources if s.item.kind != "tag" or newest[s.item.key] is s]


def _batches(sources: Sequence[Source]) -> Iterator[list[Source]]:
    """Pieces that respect MLflow's limits on metrics, parameters, tags and bytes a request."""
    batch: list[Source] = []
    texts = {"param": 0, "tag": 0}
    length = 0
    for source in sources:
        kind = source.item.kind
        extra = _json_size(source.item)
        full = len(batch) >= MAX_BATCH or length + extra > MAX_BYTES
        if batch and (full or texts.get(kind, 0) >= MAX_TEXTS):
            yield batch
            batch, texts, length = [], {"param": 0, "tag": 0}, 0
        batch.append(source)
        length += extra
        if kind in texts:
            texts[kind] += 1
    if batch:
        yield batch


def _json_size(item: Item) -> int:
    """About the bytes that an item takes in the request, escapes included."""
    return 120 + len(item.key) + (len(json.dumps(item.value)) if item.kind != "metric" else 0)
