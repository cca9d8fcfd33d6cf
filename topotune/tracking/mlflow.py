"""The one door to MLflow. It is imported on first use, because that takes seconds.

MLflow is set up for a caller that keeps its own records and tries again: no retries of its own
(a repeated ``create_run`` would make two runs), short time-outs, no telemetry, quiet loggers.
Environment variables that the user set stay as they are.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topotune.errors import ResourceError, RunError, TopotuneError
from topotune.redaction import redact
from topotune.tracking.entries import Item
from topotune.tracking.places import is_inside, own_files
from topotune.tracking.store import (
    DEFAULT_EXPERIMENT,
    PARENT_TAG,
    ROLE_TAG,
    SEARCH_TAG,
    TRIAL_TAG,
    NewRun,
    RunMissingError,
    StoredRun,
    StoreOfflineError,
    StoreRefusedError,
    check_tracking_uri,
    embedded_artifacts,
    embedded_store_uri,
)

if TYPE_CHECKING:
    from mlflow.entities import Experiment, RunInfo
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.tracking import MlflowClient

_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
}
_SEARCH_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
_PAGE = 1000
_FOREIGN = re.compile(r"API request to \S+ \S+ failed with error code (\d{3})\b")
"""How MLflow says that an answer was not its own server's JSON."""
_NETWORK = re.compile(
    r"\[Errno -?\d+\] [^'\")]+|\w+ timed out[^'\")]*|too many \d+ error responses", re.IGNORECASE
)
_import_lock = threading.Lock()


def _quiet_mlflow() -> None:
    """Import MLflow with the settings above; what it logs comes back as our own errors."""
    with _import_lock:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        importlib.import_module("mlflow.tracking")
        for name in ("mlflow", "alembic", "sqlalchemy.engine", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


class MlflowStore:
    """A tracking server or database. Nothing is contacted before the first call needs it.

    Args:
        tracking_uri: ``http(s)://...`` of a server, or a database address.
        experiment: name of the MLflow experiment, made where it is missing.
        results_dir: given for the embedded store only: where its files lie.

    Raises:
        ConfigError: the address has a form that MLflow does not serve.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str = DEFAULT_EXPERIMENT,
        results_dir: Path | None = None,
    ) -> None:
        self.tracking_uri = check_tracking_uri(tracking_uri)
        self.experiment = experiment
        self._results_dir = results_dir
        self._connected: tuple[MlflowClient, str] | None = None
        self._connecting = threading.Lock()
        self._open_runs: dict[str, RunInfo] = {}  # those made here that have not ended

    @classmethod
    def embedded(cls, results_dir: Path, experiment: str = DEFAULT_EXPERIMENT) -> MlflowStore:
        """The SQLite store of a results folder, made on first use."""
        return cls(embedded_store_uri(results_dir), experiment, results_dir.absolute())

    @property
    def label(self) -> str:
        """Address and experiment in one line, without secrets."""
        return f"{redact(self.tracking_uri)} experiment {self.experiment}"

    @property
    def on_server(self) -> bool:
        """Whether it is a server, which has pages of its own."""
        return self.tracking_uri.startswith(("http://", "https://"))

    def preload(self) -> None:
        """Import MLflow now, in this thread; contacts nothing.

        To be called before a thread ships while another imports Ray Tune, which imports MLflow
        too: its modules import each other in circles, and two threads at once can end up with
        halves of them.
        """
        _quiet_mlflow()

    def _connect(self) -> tuple[MlflowClient, str]:
        with self._connecting:
            if self._connected is None:
                _quiet_mlflow()
                try:
                    with translated(), own_files(self._results_dir, self.experiment, _make_whole):
                        self._connected = self._open()
                except (StoreRefusedError, RunMissingError) as error:
                    # Nothing was refused for what it says: the store as a whole is not usable.
                    raise StoreOfflineError(str(error)) from None
            return self._connected

    def _open(self) -> tuple[MlflowClient, str]:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.tracking_uri, registry_uri=self.tracking_uri)
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            location = None if self.artifacts is None else self.artifacts.as_uri()
            try:
                return client, client.create_experiment(self.experiment, location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(self.experiment)
        if found is None:  # made by somebody else, and deleted at once
            raise StoreOfflineError(f"experiment {self.experiment!r} is gone from MLflow")
        self._check_active(found)
        return client, str(found.experiment_id)

    @property
    def artifacts(self) -> Path | None:
        """Where the embedded store keeps artifacts; None for any other store."""
        return None if self._results_dir is None else embedded_artifacts(self._results_dir)

    @property
    def experiment_id(self) -> str:
        """MLflow's id of the experiment."""
        return self._connect()[1]

    def look(self) -> None:
        """Ask the store for the experiment, and make nothing in it.

        Raises:
            StoreOfflineError, StoreRefusedError, RunMissingError: with the cause in one line.
        """
        _quiet_mlflow()
        from mlflow.tracking import MlflowClient

        with translated():
            client = MlflowClient(self.tracking_uri, registry_uri=self.tracking_uri)
            found = client.get_experiment_by_name(self.experiment)
            if found is not None:
                self._check_active(found)

    def _check_active(self, found: Experiment) -> None:
        if found.lifecycle_stage != "active":
            raise StoreOfflineError(
                f"experiment {self.experiment!r} is deleted in MLflow. Restore it there or choose "
                "another experiment name"
            )

    def ping(self) -> None:
        """Contact the store, making it where it is the embedded one.

        Raises:
            StoreOfflineError: with the cause in one line.
        """
        self.experiment_tags()

    def experiment_tags(self) -> dict[str, str]:
        """All tags of the experiment."""
        client, experiment_id = self._connect()
        with translated():
            return dict(client.get_experiment(experiment_id).tags)

    def tag_experiment(self, tags: Mapping[str, str]) -> None:
        """Set tags of the experiment; others stay."""
        client, experiment_id = self._connect()
        with translated():
            for name, text in tags.items():
                client.set_experiment_tag(experiment_id, name, text)

    def runs(self, search_id: str, trial: int | None = None) -> list[StoredRun]:
        """The runs of a search that carry its tag, oldest first; of one trial if it is given."""
        extra = "" if trial is None else f" and tags.`{TRIAL_TAG}` = '{int(trial)}'"
        return self._find(search_id, extra)

    def parent(self, search_id: str) -> StoredRun | None:
        """The search's own run, the oldest if there are several."""
        return next(iter(self._find(search_id, f" and tags.`{ROLE_TAG}` = 'search'")), None)

    def _find(self, search_id: str, extra: str) -> list[StoredRun]:
        if not _SEARCH_ID.fullmatch(search_id):
            raise StoreRefusedError(f"search id {search_id!r:.80}: expected letters and digits")
        client, experiment_id = self._connect()
        from mlflow.entities import ViewType

        query = f"tags.`{SEARCH_TAG}` = '{search_id}'{extra}"
        found: list[StoredRun] = []
        token = None
        while True:
            try:
                with translated():
                    page = client.search_runs(
                        [experiment_id], query, ViewType.ALL, _PAGE, page_token=token
                    )
            except RunMissingError as error:  # the experiment itself is gone: look it up anew
                self._connected = None
                raise StoreOfflineError(str(error)) from None
            found += [StoredRun.of(run) for run in page]
            token = page.token
            if not token:
                return sorted(found, key=lambda run: (run.deleted, run.start_ms, run.run_id))

    def create_run(self, run: NewRun) -> str:
        """Make a run and return its id."""
        client, experiment_id = self._connect()
        tags = {
            SEARCH_TAG: run.search_id,
            ROLE_TAG: "search" if run.trial is None else "trial",
            "mlflow.source.name": "topotune",
            **run.tags,
        }
        if run.trial is not None:
            tags[TRIAL_TAG] = str(run.trial)
        if run.parent_id is not None:
            tags[PARENT_TAG] = run.parent_id
        with translated():
            made = client.create_run(experiment_id, run.start_ms, tags, run.name)
            self._open_runs[str(made.info.run_id)] = made.info
            return str(made.info.run_id)

    def log(self, run_id: str, batch: Sequence[Item]) -> None:
        """Send one batch, within MLflow's limits (1000 entities, 100 parameters, 100 tags)."""
        client, _ = self._connect()
        from mlflow.entities import Metric, Param, RunTag

        with translated():
            client.log_batch(
                run_id,
                [Metric(i.key, float(i.value), i.at, i.step) for i in batch if i.kind == "metric"],
                [Param(i.key, str(i.value)) for i in batch if i.kind == "param"],
                [RunTag(i.key, str(i.value)) for i in batch if i.kind == "tag"],
            )

    def log_artifact(self, run_id: str, path: Path, folder: str) -> None:
        """Upload one file, replacing one of the same name.

        An embedded store that came from elsewhere may name any folder of this machine as its own;
        nothing is written there.
        """
        client, _ = self._connect()
        with translated():
            if self.artifacts is None:
                client.log_artifact(run_id, str(path), folder or None)
            else:
                files = self._own_files(run_id, self.artifacts)
                files.log_artifact(str(path), folder or None)  # type: ignore[no-untyped-call]

    def artifact_names(self, run_id: str) -> set[str]:
        """The files that a run has, those in folders left out."""
        client, _ = self._connect()
        with translated():
            if self.artifacts is None:
                found = client.list_artifacts(run_id)
            else:
                found = self._own_files(run_id, self.artifacts).list_artifacts()
            return {file.path for file in found if not file.is_dir}

    def _own_files(self, run_id: str, artifacts: Path) -> ArtifactRepository:
        """The files of a run of the embedded store.

        Not through the client, which remembers the place of a run of any store by its id.
        """
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

        client, _ = self._connect()
        place = str(self._info(run_id).artifact_uri)
        if not is_inside(place, artifacts):
            # Another process re-based them, which sees this folder under another path.
            with own_files(self._results_dir, self.experiment, _make_whole):
                place = str(client.get_run(run_id).info.artifact_uri)
        if not is_inside(place, artifacts):
            raise StoreRefusedError(f"its run keeps files in {place}, not in this folder")
        return LocalArtifactRepository(place)

    def log_data(self, run_id: str, name: str, digest: str, rows: str) -> None:
        """A dataset input: by its name and digest it is one and the same in the experiment."""
        client, _ = self._connect()
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"tags": {"mlflow.source.name": name}})
        found = Dataset(name, digest, "code", source, profile=json.dumps({"rows": rows}))
        used = [InputTag("mlflow.data.context", "training")]
        with translated():
            client.log_inputs(run_id, [DatasetInput(found, used)])

    def terminate(self, run_id: str, status: str, end_ms: int) -> None:
        """Set a final status; a run never ends before it began, whatever the clocks say."""
        client, _ = self._connect()
        with translated():
            began = self._info(run_id).start_time
            client.set_terminated(run_id, status, max(end_ms, began))
        self._open_runs.pop(run_id, None)

    def _info(self, run_id: str) -> RunInfo:
        """What never changes of a run. Asked of the store only for runs that this one did not make:
        the store reads all metrics of a run for it."""
        known = self._open_runs.get(run_id)
        return known or self._connect()[0].get_run(run_id).info

    def reopen(self, run_id: str) -> None:
        """Set a run back to RUNNING."""
        client, _ = self._connect()
        with translated():
            client.update_run(run_id, status="RUNNING")

    def client(self) -> MlflowClient:
        """MLflow's own client, connected."""
        return self._connect()[0]


def _make_whole(database: Path) -> None:
    """Make an embedded database under another name first: a process that is killed meanwhile must
    not leave half of its tables, which MLflow would refuse for ever."""
    from mlflow.tracking import MlflowClient

    if database.exists():
        return
    partial = database.with_name(f"{database.name}.partial")
    for left in (partial, partial.with_name(f"{partial.name}-journal")):
        left.unlink(missing_ok=True)
    address = f"sqlite:///{partial}"
    MlflowClient(address, registry_uri=address).search_experiments(max_results=1)
    # Kept in the file: a commit costs one forced write instead of three, and pages that are read
    # meanwhile do not hold up the shipper.
    with closing(sqlite3.connect(partial)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    partial.replace(database)


@contextmanager
def translated() -> Iterator[None]:
    """MLflow's and its libraries' errors as ours, in one line and without secrets."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise _classified(error) from None
    except ResourceError as error:  # of the embedded store's own folder
        raise StoreOfflineError(str(error)) from None
    except TopotuneError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever its libraries raise, it comes out as ours
        if _turned_down(getattr(error, "response", None)):
            raise StoreRefusedError(_one_line(error)) from None
        raise StoreOfflineError(f"{type(error).__name__}: {_one_line(error)}") from None


def _permanent(status: int, own: bool) -> bool:
    """Whether an HTTP status means that this content will never be taken.

    A wrong password (401, 403) or address (404 without a record) concerns every record alike:
    setting them all aside would lose a search, so that these wait like an outage.

    Args:
        status: of the answer.
        own: whether MLflow itself answered, in its JSON. A page of something in between (a
            reverse proxy, a sign-in) judges no record, except for its size.
    """
    if not own:
        return status == 413
    return 400 <= status < 500 and status not in (401, 403, 404, 408, 409, 429, 499)


def _classified(error: Any) -> RunError:
    """An MlflowException as refused for good, missing, or to be tried again."""
    text = _one_line(error)
    foreign = _FOREIGN.match(str(error))
    if foreign is not None:
        final = _permanent(int(foreign[1]), own=False)
    elif error.error_code == "RESOURCE_DOES_NOT_EXIST":
        return RunMissingError(text)
    else:
        final = _permanent(int(error.get_http_status_code()), own=True)
    return StoreRefusedError(text) if final else StoreOfflineError(text)


def _turned_down(response: Any) -> bool:
    """Whether an answer to an upload means that this file will never be taken.

    Args:
        response: of the library ``requests``, or what another library keeps in its place.
    """
    try:
        body = response.json()
        own = isinstance(body, dict) and isinstance(body.get("error_code"), str)
        return _permanent(int(response.status_code), own)
    except AttributeError:  # of another library: nothing is known
        return False
    except ValueError:  # no JSON
        return _permanent(int(response.status_code), own=False)


def _one_line(error: Exception) -> str:
    """What an error says, in a line, without secrets."""
    text = " ".join(str(error).split())
    if text.startswith("API request to") and (cause := _NETWORK.search(text)) is not None:
        return f"no answer from the server: {cause[0].strip()}"
    return redact(text)[:300] or type(error).__name__
