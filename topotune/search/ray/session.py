"""A connection to Ray, with the settings that it reads at its start."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from topotune.errors import ResourceError
from topotune.redaction import brief
from topotune.search.drive.signals import Interrupts, shielded
from topotune.search.ray.autoscaler import Growth, growth
from topotune.search.ray.cluster import Cluster, Node
from topotune.search.ray.ray_internals import free_by_node, silence_processes
from topotune.search.ray.sweep import Sweeper
from topotune.search.view import Listener

# Read by Ray when it is imported or started: no usage reports, no signal handler of Tune's own
# (ours drains), no CSV, JSON and TensorBoard writers, workers stay in the driver's folder. What
# workers print is kept up to a bound. What a killed worker leaves running is ended with it.
_RAY_ENVIRONMENT = {
    "RAY_ROTATION_MAX_BYTES": str(4 * 2**20),
    "RAY_ROTATION_BACKUP_COUNT": "1",
    "RAY_process_group_cleanup_enabled": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


T = TypeVar("T")
CONNECT_SECONDS = 10.0
_DEEPEST = "/ray/session_2026-11-27_18-37-50_267095_4194304/sockets/plasma_store"
MOST_BYTES = 107 - len(_DEEPEST)
"""The longest path that Ray's sockets fit below: that of a socket has 107 bytes."""
_SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")


def _fix_relative_paths() -> None:
    """Let PYTHONPATH mean in workers, which start elsewhere, what it means here."""
    if paths := os.environ.get("PYTHONPATH"):
        whole = [str(Path(path).absolute()) for path in paths.split(os.pathsep)]
        os.environ["PYTHONPATH"] = os.pathsep.join(whole)


def _own_token() -> None:
    """Give a local Ray a token of this process: Ray would write one below HOME, which may be
    read-only or missing."""
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def usual_folder() -> Path:
    """Where a local Ray keeps its sockets and logs, unless that cannot be."""
    return Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")), "ray")


def _short_folder() -> str | None:
    """A new folder for a local Ray where its usual one cannot be used; None where it can.

    Raises:
        ResourceError: there is no other place for one.
    """
    usual = usual_folder()
    length = len(os.fsencode(usual.parent))
    if usual.is_absolute() and length <= MOST_BYTES and _can_be_made(usual):
        return None
    for place in _SHORT_PLACES:
        with contextlib.suppress(OSError):
            return tempfile.mkdtemp(prefix="ray-", dir=place)
    raise ResourceError(
        f"{usual.parent}: Ray's sockets cannot lie below it: that takes a writable folder whose "
        f"whole path has at most {MOST_BYTES} bytes (this one has {length}). Nor can they below "
        f"{', '.join(_SHORT_PLACES)}. Set RAY_TMPDIR to such a folder"
    )


def _can_be_made(folder: Path) -> bool:
    parts = (folder, *folder.parents)
    # Not Path's own exists(), which raises below a folder that is closed to this user.
    there = next(path for path in parts if os.path.exists(path))  # noqa: PTH110
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _nodes() -> list[dict[str, Any]]:
    """The nodes that are up, as Ray describes them."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


class RaySession:
    """A connection to Ray that is closed in any case.

    Args:
        address: "local" starts a cluster of its own, though the environment or a file in the
            temporary directory may name another; "auto" takes what RAY_ADDRESS names, else the
            cluster that was started last on this machine; else a cluster's address.
        listener: gets a line when Ray starts, which takes seconds.
        interrupts: holds signals back while Ray starts; None where they are not handled.
    """

    def __init__(
        self, address: str, listener: Listener, interrupts: Interrupts | None = None
    ) -> None:
        if address == "auto":  # Ray itself would take the cluster that was started last
            address = os.environ.get("RAY_ADDRESS", address)
        self._address, self._listener = address, listener
        self._held = contextlib.nullcontext if interrupts is None else interrupts.held
        self._sweeper = Sweeper()
        self._folder: str | None = None  # Ray's, where it is one of our own

    def __enter__(self) -> Self:
        os.environ.update(_RAY_ENVIRONMENT)
        self._check_reachable()
        self._listener.note("starting Ray" if self.local else "connecting to Ray")
        try:
            # The shield goes last: what it held back must meet our handlers, not Ray's, which
            # abort; leaving the inner block puts ours back.
            with shielded(), self._held():
                self._connect()
        except BaseException:
            self.__exit__()
            raise
        # Tune logs a traceback when a worker dies; ours says it in a line, and the cause is kept.
        for name in ("ray", "ray.tune"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        return self

    def _check_reachable(self) -> None:
        """Find out at once what Ray would try for minutes.

        Raises:
            ResourceError: nothing listens at the address.
        """
        host, colon, port = self._address.rpartition(":")
        if not colon or not port.isdecimal() or "/" in host:
            return  # local, auto, or of another form
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ResourceError(
                f"--ray-address {self._address}: no Ray answers there ({error}). It is the address "
                "that 'ray start --head' prints, HOST:6379"
            ) from None

    def _connect(self) -> None:
        import ray

        silence_processes()
        local = self._address == "local"
        options: dict[str, Any] = {"include_dashboard": False} if local else {}
        folder = None
        if local:
            _own_token()
            if (folder := _short_folder()) is not None:
                options["_temp_dir"] = folder
        self._sweeper.__enter__()
        try:
            # Ray puts the current folder before the libraries in its workers, where a file named
            # like one of them would run; a trial's own modules are found by TrialActor.setup().
            _fix_relative_paths()
            with contextlib.chdir(os.sep):
                ray.init(
                    address=self._address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=True,
                    **options,
                )
            self._folder = folder
        except Exception as error:  # Ray raises bare ones, too, such as for a node that is late
            text = brief(str(error), 300)
            raise ResourceError(
                f"Ray does not start ({type(error).__name__}: {text}). 'topotune doctor' looks "
                f"into it; the logs are in the newest folder under {folder or usual_folder()}"
            ) from error

    def __exit__(self, *_: object) -> None:
        import ray

        try:
            ray.shutdown()
        finally:
            self._sweeper.__exit__()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def local(self) -> bool:
        """Whether the cluster is our own."""
        return self._address == "local"

    def cluster(self) -> Cluster:
        """What the cluster has now, what of it is free, and what an autoscaler may add.

        Raises:
            ConfigError: the file that says what may be added is broken.
        """
        free = free_by_node()
        nodes = tuple(Node(node["Resources"], free.get(node["NodeID"], {})) for node in _nodes())
        more = Growth() if self.local else growth()
        return Cluster(nodes, more.types, more.most_workers, more.limits)

    def size(self) -> tuple[float, float]:
        """CPUs and GPUs of the whole cluster."""
        now = self.cluster()
        return now.total("CPU"), now.total("GPU")

    def hosts(self) -> int:
        """Machines of the cluster, by their addresses."""
        return len({node["NodeManagerAddress"] for node in _nodes()})

    def on_each_node(
        self, look: Callable[[float], T], seconds: float
    ) -> Iterator[tuple[str, T | None, str]]:
        """Run a function on every node at the same time.

        Args:
            look: called in a worker with the GPUs that Ray offers on its node.
            seconds: how long all of them may take.

        Yields:
            A node's address and id, and its answer, or None and why it gave no answer.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        run: Any = ray.remote(num_cpus=0, max_retries=0)(lambda gpus: look(gpus))
        asked: dict[Any, str] = {}
        for node in _nodes():
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            reference = run.options(scheduling_strategy=there).remote(
                node["Resources"].get("GPU", 0.0)
            )
            asked[reference] = f"{node['NodeManagerAddress']} {node['NodeID'][:6]}"
        end = time.monotonic() + seconds
        for reference, place in asked.items():
            try:
                yield place, ray.get(reference, timeout=max(end - time.monotonic(), 1.0)), ""
            except ray.exceptions.RayError as error:
                yield place, None, str(error)

    def probe(self) -> str:
        """Run a task on a worker process; what it said."""
        import ray

        @ray.remote(num_cpus=1)
        def answer() -> int:
            return os.getpid()

        return f"ran in process {ray.get(answer.remote(), timeout=60)}"
