"""The Ray actor that trains: one Tune step is one epoch, one actor serves many trials.

What the trial leaves behind (checkpoint, trace) lies in its own folder, and is all that a restart
needs: Tune's checkpoints are not used. What it measures goes to the driver with each step. An
exception in user code ends the trial as FAILED and is not retried; only the death of the process
is. A :class:`~topotune.search.ray.watchdog.Guard` watches each trial while it works.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune

from topotune import __version__
from topotune.config.budget import Limits
from topotune.errors import (
    CheckpointError,
    DataUnavailableError,
    DivergedError,
    GpuMemoryError,
    ResourceError,
    StoppedError,
    TopotuneError,
    UnstableError,
)
from topotune.files import disk_fault, files_exhausted
from topotune.records import EpochReport, Outcome, TrialSpec
from topotune.redaction import brief, redact
from topotune.search.code.shipped import await_env
from topotune.search.code.source import CODE_TAG, Source
from topotune.search.code.usercode import code_digest, contents, hashes, user_files
from topotune.search.drive.book import Progress
from topotune.search.drive.signals import unshield
from topotune.search.place.folder import SearchFolder
from topotune.search.place.objects.address import StoreAddress, store_address
from topotune.search.place.objects.courier import Courier
from topotune.search.place.output import ERROR_FILE, Output
from topotune.search.ray.slate import Slate
from topotune.search.ray.system_metrics import SystemMetrics
from topotune.search.ray.tune import ALONE, PAYLOAD
from topotune.search.ray.watchdog import Guard
from topotune.tracking.entries import Body, Metrics, now_ms


class TrialActor(tune.Trainable):
    """Runs :class:`topotune.train.trial.TrialRun` one epoch a step.

    Its config: ``number``, ``spec`` (JSON), ``search`` (the search's folder), ``store`` (the
    object store that it is kept in, empty for none), ``limits``, ``cwd`` (where a user's modules
    are found), ``version`` (the driver's), ``gpus`` (that a trial holds), ``gpu_memory``, ``alone``
    (whether it holds at least a whole one, to itself), ``source`` (which code the driver found).
    """

    _loaded = False
    _output: Output | None = None
    _slate: Slate | None = None
    _guard: Guard | None = None
    _courier: Courier | None = None
    _run: Any = None
    _reports: Iterator[EpochReport] | None = None

    def setup(self, config: dict[str, Any]) -> None:
        """Take a trial on; it opens at the first step, where its errors can be reported."""
        unshield()
        self._spec = TrialSpec.from_json(config["spec"])
        self._number = int(config["number"])
        self._search, self._version = Path(config["search"]), config["version"]
        self._courier = None
        if config["store"]:
            address = StoreAddress.parse(config["store"])
            self._courier = Courier(address, self._search.name, self._number, self._beat)
            self._search = self._courier.search
        self._folder = self._search / "trials" / f"{self._number:04d}"
        self._run = self._reports = None
        self._told = False
        self._source = config["source"]
        self._gpus, self._alone = float(config["gpus"]), bool(config[ALONE])
        self._gpu_memory = config["gpu_memory"]
        limits = Limits.model_validate(config["limits"])
        ending = self._courier.send_note if self._courier is not None else lambda: None
        self._guard = Guard(self._folder, limits.stall, limits.memory, ending)
        if config["cwd"] not in sys.path:
            sys.path.append(config["cwd"])  # last: a file there stands in for no library
        if not TrialActor._loaded:
            await_env()
            TrialActor._loaded = True
        with contextlib.suppress(OSError):  # a node without that folder imports from elsewhere
            os.chdir(config["cwd"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Serve the next trial in this process; with its opening, all global state is reset."""
        self._drop()
        if self._slate is not None:
            self._slate.wipe()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """The actor ends."""
        self._drop()

    def _drop(self) -> None:
        if self._reports is not None:
            self._reports.close()  # type: ignore[attr-defined]
        self._run = self._reports = None
        if self._guard is not None:
            self._guard.close()
        self._guard = None
        if self._output is not None:
            self._output.close()
        self._output = None
        if self._courier is not None:
            self._courier.close()
        self._courier = None

    def step(self) -> dict[str, Any]:
        """Train one epoch; after a restart, first give all known epochs again."""
        assert self._guard is not None  # setup() makes it
        with self._guard.watching():
            progress = self._stored(self._advance())
        over = progress.outcome is not None or bool(progress.stop)
        return {PAYLOAD: progress.to_json(), "done": over}

    def _stored(self, progress: Progress) -> Progress:
        """What the step has left behind is in the store before the driver hears of the step."""
        if self._courier is None:
            return progress
        try:
            if self._output is not None:
                self._output.tidy()
            self._courier.push()
        except TopotuneError as error:
            return self._progress(stop=progress.stop or str(error))
        return progress

    def _advance(self) -> Progress:
        try:
            return self._next()
        except GpuMemoryError:
            raise  # the driver's to judge, as the death of this worker
        except DivergedError as error:
            steps = () if self._run is None else (self._run.series(now_ms()),)
            return self._progress((), steps, Outcome.DIVERGED, str(error))
        except StoppedError as error:
            return self._progress(outcome=Outcome.PRUNED, reason=str(error))
        except UnstableError as error:
            # Dynamics that cannot settle: what would diverge is not even started.
            return self._progress(outcome=Outcome.DIVERGED, reason=str(error))
        except (CheckpointError, ResourceError, DataUnavailableError) as error:
            # The machine's fault, not the trial's: the same would meet every other trial, so the
            # search stops and this trial stays resumable. Files that were left open in training are
            # the trial's own.
            if self._reports is not None and files_exhausted(error):
                return self._failed(error)
            return self._progress(stop=str(error))
        except TopotuneError as error:
            return self._progress(outcome=Outcome.FAILED, reason=f"{error}")
        except BaseException as error:
            if _raised_by_ray(error):
                raise
            if disk_fault(error, self._search):
                text = (
                    f"{self._folder}: {error}. Make space or make the folder writable, then resume"
                )
                return self._progress(stop=text)
            return self._failed(error)

    def _failed(self, error: BaseException) -> Progress:
        """FAILED with the exception's text; the traceback goes into the trial's folder."""
        text = f"{type(error).__name__}: {_words(error)}".removesuffix(": ")
        return self._progress(outcome=Outcome.FAILED, reason=text + self._traceback())

    def _traceback(self) -> str:
        """Write the traceback of the exception at hand into the trial's folder; where it is."""
        where = self._folder / ERROR_FILE
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            where.write_text(
                redact(traceback.format_exc()), encoding="utf-8", errors="backslashreplace"
            )
        except OSError as full:
            return f" (its traceback could not be written: {full.strerror})"
        place = where if self._courier is None else self._courier.place(ERROR_FILE)
        return f" (traceback: {place})"

    def _next(self) -> Progress:
        from topotune.train.devices import lacks_memory, memory_in_words

        try:
            return self._train()
        except Exception as error:
            if not (self._gpus > 0 and lacks_memory(error)):
                raise
            where = "alone on its device, " if self._alone else ""
            words = memory_in_words(error, self._share())
            raise GpuMemoryError(where + words + self._traceback()) from None

    def _share(self) -> float:
        from topotune.train.devices import memory_share

        return memory_share(self._gpus, self._gpu_memory, self._alone)

    def _train(self) -> Progress:
        if self._reports is None:
            self._check_node()
            from topotune.train.devices import cap_memory, check_gpus
            from topotune.train.trial import open_trial

            if self._courier is not None:
                self._courier.fetch()
            self._output = self._output or Output(self._folder)
            if self._gpus > 0:
                check_gpus(self._gpus)
                cap_memory(self._share())
            self._system = SystemMetrics()
            self._run = open_trial(self._spec, self._folder, self._beat, self._code_tags())
            if self._slate is None:
                self._slate = Slate()
            self._reports = self._run.reports()
            replayed = [next(self._reports) for _ in range(self._run.restored)]
            if replayed:
                return self._progress(replayed, self._run.record.last_series(self._folder))
        report = next(self._reports)
        at = report.timestamp_ms
        load = Metrics(self._system.sample(), report.epoch, at)
        return self._progress([report], (self._run.series(at), *((load,) if load.values else ())))

    def _check_node(self) -> None:
        """See that this node can do what the driver asks for.

        Raises:
            ResourceError: it has another topotune, or does not see the search's folder.
        """
        here = f"node {socket.gethostname()}"
        if self._version != __version__:
            raise ResourceError(
                f"{here}: has topotune {__version__}, and the driver {self._version}. Install the "
                "same version on every node, then resume"
            )
        if self._courier is None and not SearchFolder(self._search).meta.is_file():
            raise ResourceError(
                f"{here}: does not see {self._search}, where the search lies. Put the results "
                "where all nodes have them under one path (TOPOTUNE_STORAGE, --results-dir): a "
                "shared file system, s3:// or gs://. 'topotune doctor --address' tries it"
            )

    def _code_tags(self) -> dict[str, str]:
        """Which code this process runs. Only where that is the driver's, it is of its commit."""
        code, tags = _code(tuple(self._source["modules"])), dict(self._source["tags"])
        return tags if code == tags.get(CODE_TAG, "") else {CODE_TAG: code or "none"}

    def _beat(self) -> None:
        if self._guard is not None:
            self._guard.beat()

    def _progress(
        self,
        reports: Sequence[EpochReport] = (),
        entries: tuple[Body, ...] = (),
        outcome: Outcome | None = None,
        reason: str = "",
        stop: str = "",
    ) -> Progress:
        """What is reported, with what the trial began with where that is not reported yet."""
        overhead: Mapping[str, float] = {}
        if self._run is not None:
            record = self._run.record
            overhead = record.overhead.metrics
            if not self._told:
                entries, self._told = (*record.entries(), *entries), True
        if reports and reports[-1].epoch >= self._spec.epochs:
            outcome = Outcome.COMPLETE
        return Progress(tuple(reports), overhead, outcome, reason, stop, entries)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Tune's checkpoints are not used; this one only says so."""
        return {"number": self._number}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing to load."""


def _words(error: BaseException) -> str:
    """What an exception says, whatever a user's own class does when it is asked."""
    try:
        return brief(str(error), 500)
    except Exception as failed:  # noqa: BLE001 - the trial ends by the first one
        return f"(its text raises {type(failed).__name__})"


def _raised_by_ray(error: BaseException) -> bool:
    """Whether Ray ends this process by a SystemExit, as after SIGTERM; no fault of the trial."""
    if not isinstance(error, SystemExit):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    places = (str(Path(ray.__file__).parent), "python/ray/")  # the second one of what is compiled
    return bool(frames) and frames[-1].filename.startswith(places)


@functools.cache
def _code(modules: tuple[str, ...]) -> str:
    """The digest of modules as this process found them before it imported them, for its first
    trial."""
    return code_digest(hashes(contents(user_files(modules, Path.cwd()))))


def trial_config(
    number: int,
    spec: TrialSpec,
    search: Path,
    limits: Limits,
    modules: Path,
    *,
    gpus: float = 0.0,
    gpu_memory: float | Literal["auto"] = "auto",
    alone: bool = False,
    source: Source | None = None,
) -> dict[str, Any]:
    """The config that a :class:`TrialActor` takes; ``modules`` is the folder of a user's own."""
    code: dict[str, object] = {"modules": [], "tags": {}}
    if source is not None:
        code = {"modules": list(source.modules), "tags": source.trial_tags}
    return {
        "number": number,
        "spec": json.dumps(spec.to_dict()),
        "search": str(search),
        "store": str(store_address(search.parent) or ""),
        "limits": limits.model_dump(mode="json"),
        "cwd": str(modules),
        "version": __version__,
        "gpus": gpus,
        "gpu_memory": gpu_memory,
        ALONE: alone,
        "source": code,
    }
