"""A Ray cluster's Jobs API: who may talk to it, and topotune's jobs on it.

Ray runs the jobs, keeps their logs and stops them; nothing of topotune listens on the cluster. A
job that drives a search is stopped by SIGTERM, on which its trials are saved, and Ray waits for
that (``RAY_JOB_STOP_WAIT_TIME_S``) before it would kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import logging
import os
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from topotune import __version__
from topotune.errors import ConfigError, ResourceError, RunError
from topotune.redaction import brief

DRAIN_SECONDS = 60
"""How long Ray waits for a search to drain before it kills the job; a search needs 20 at most."""
ANSWER_SECONDS = 15.0
OPEN = "--allow-open"
DRIVERS = ("search", "resume", "extend")
"""The verbs of jobs that drive a search."""
_TOKEN_FILE = Path("~/.ray/auth_token")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LABELS = {"search": "topotune_search", "verb": "topotune_verb", "user": "topotune_user"}


@dataclass(frozen=True)
class Job:
    """A job of topotune's on a cluster.

    Attributes:
        id: Ray's submission id.
        search, verb, user: what runs ("search", "resume", "extend"), for which search and whom.
        status: Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        started: Unix time in seconds; of its submission.
        exit_code: of its process; None while it runs, or if it was stopped.
        message: Ray's words on how it stands.
    """

    id: str
    search: str
    verb: str
    user: str
    status: str
    started: float
    exit_code: int | None
    message: str

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


def find_token() -> tuple[str, str]:
    """The token for Ray and where it was found, both empty for none; the places that Ray looks at.

    Raises:
        ConfigError: the file that RAY_AUTH_TOKEN_PATH names cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else _TOKEN_FILE.expanduser()
    try:
        return path.read_text(encoding="utf-8").strip(), str(path)
    except (OSError, UnicodeDecodeError) as error:
        if named:
            raise ConfigError("RAY_AUTH_TOKEN_PATH", f"cannot be read: {error}") from None
    return "", ""


def user_name() -> str:
    """Who asks, for a person to read; proves nothing."""
    try:
        return os.environ.get("TOPOTUNE_USER") or getpass.getuser()
    except (OSError, KeyError):  # a container's user id without a name
        return "unknown"


class JobsApi:
    """The Jobs API at an address, asked with a token.

    Args:
        address: of Ray's dashboard, ``http://HEAD:8265``.
        allow_open: also one that takes jobs from anybody.
        note: gets a line on what a person should know of the connection.

    Raises:
        ConfigError: the address is of another form, or the token is missing or wrong.
        ResourceError: it does not answer, or asks for no token.
    """

    def __init__(
        self,
        address: str,
        allow_open: bool = False,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.address = _checked(address)
        parts = urlsplit(self.address)
        token, source = find_token()
        # requests and aiohttp look for certificates in different places; here is one for both.
        found = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
        self._verify: str | bool = found or True
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._check_door(headers, source, allow_open)
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK and token:
            note(
                f"{self.address} is not encrypted: who reads the network between reads the token. "
                "Take an SSH tunnel, or https by a proxy before it"
            )
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        with self._our_errors():
            self._client = JobSubmissionClient(
                self.address, headers=headers or None, verify=self._verify
            )

    def _check_door(self, headers: Mapping[str, str], source: str, allow_open: bool) -> None:
        stranger = self._version({})
        if stranger == 200:
            if allow_open:
                return
            raise ResourceError(
                f"{self.address}: takes jobs, which run any code, from anybody who reaches it: its "
                "token authentication is off. Start every node with RAY_AUTH_MODE=token and one "
                f"token ('ray get-auth-token --generate'), or accept that with {OPEN}"
            )
        if stranger not in (401, 403):
            raise ResourceError(
                f"{self.address}: answers, but not as Ray's dashboard does (HTTP {stranger}). Give "
                "the address of the Jobs API, such as http://HEAD:8265"
            )
        if not headers:
            raise ConfigError(
                self.address,
                "asks for a token, and there is none here",
                "Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it; on the head "
                "'ray get-auth-token' shows it",
            )
        if self._version(headers) in (401, 403):
            raise ConfigError(
                self.address,
                f"does not accept the token of {source}",
                "Set RAY_AUTH_TOKEN to the cluster's ('ray get-auth-token' on its head shows it)",
            )

    def _version(self, headers: Mapping[str, str]) -> int:
        """HTTP status of the question for Ray's version."""
        import requests

        with self._our_errors():
            found = requests.get(
                f"{self.address}/api/version",
                headers=dict(headers),
                timeout=ANSWER_SECONDS,
                verify=self._verify,
                allow_redirects=False,
            )
        return int(found.status_code)

    @contextlib.contextmanager
    def _our_errors(self) -> Iterator[None]:
        """What the client and its libraries raise, as errors of ours."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except requests.exceptions.SSLError as error:
            raise ResourceError(
                f"{self.address}: its certificate is not trusted here: {brief(str(error), 200)}. "
                "Set SSL_CERT_FILE to the file with its authority's certificate"
            ) from None
        except (requests.exceptions.RequestException, ConnectionError, TimeoutError) as error:
            raise ResourceError(
                f"{self.address}: no Ray cluster answers ({type(error).__name__}). Is it up, and "
                "its dashboard's port (8265) open to this machine, by a tunnel perhaps ('ssh -L "
                "8265:127.0.0.1:8265 HEAD')?"
            ) from None
        except AuthenticationError as error:
            raise ConfigError(self.address, f"refuses: {brief(str(error), 200)}") from None
        except RuntimeError as error:
            if "No available agent" in str(error):
                raise ResourceError(
                    f"{self.address}: the head's agent, which starts jobs, does not listen. Most "
                    "often its port (52365) was taken when Ray started, by another Ray on that "
                    "machine: start the head with --dashboard-agent-listen-port=FREE"
                ) from None
            raise RunError(f"{self.address}: {brief(str(error), 500)}") from None

    def submit(
        self,
        arguments: Sequence[str],
        labels: Mapping[str, str],
        package: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Have the cluster run ``topotune`` with these arguments; the job's id.

        Args:
            arguments: of the command, on the cluster's own settings.
            labels: search and verb, by which the job is found again.
            package: a folder that the job starts in.
            env: variables, which everybody with the token can read.
        """
        words = shlex.join(["-P", "-m", "topotune", "--on-cluster", __version__, *arguments])
        runtime: dict[str, Any] = {
            "env_vars": {
                "RAY_JOB_STOP_WAIT_TIME_S": str(DRAIN_SECONDS),
                "TOPOTUNE_USER": user_name(),
                **(env or {}),
            }
        }
        if package is not None:
            runtime["working_dir"] = str(package)
        named = {_LABELS[name]: value for name, value in labels.items()}
        with self._our_errors():
            return str(
                self._client.submit_job(
                    entrypoint=f'exec "${{TOPOTUNE_PYTHON:-python}}" {words}',
                    submission_id=f"topotune-{labels['search']}-{secrets.token_hex(4)}",
                    runtime_env=runtime,
                    metadata={_LABELS["user"]: user_name(), **named},
                )
            )

    def jobs(self) -> list[Job]:
        """The jobs that drive searches, the newest first; none of those that only ask."""
        with self._our_errors():
            found = self._client.list_jobs()
        jobs = [_job(details) for details in found if details.submission_id]
        drivers = [job for job in jobs if job.verb in DRIVERS]
        return sorted(drivers, key=lambda job: job.started, reverse=True)

    def job(self, job_id: str) -> Job:
        """How a job stands."""
        with self._our_errors():
            return _job(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """What a job has printed."""
        with self._our_errors():
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, show: Callable[[str], None]) -> None:
        """Show what a job prints until it ends."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job_id):
                show(text)

        import aiohttp

        with self._our_errors():
            try:
                asyncio.run(tail())
            except aiohttp.ClientError as error:
                raise ConnectionError(str(error)) from None

    def stop(self, job_id: str) -> None:
        """Ask Ray to stop a job in good order; returns at once."""
        with self._our_errors():
            self._client.stop_job(job_id)

    def forget(self, job_id: str) -> None:
        """Take a job that has ended off Ray's list."""
        with self._our_errors():
            self._client.delete_job(job_id)

    def wait(self, job_id: str, seconds: float, pause: float = 0.2) -> Job:
        """How a job stands when it has ended, or after ``seconds``."""
        end = time.monotonic() + seconds
        job = self.job(job_id)
        while not job.over and time.monotonic() < end:
            time.sleep(pause)
            job = self.job(job_id)
        return job


def _checked(address: str) -> str:
    """An address of the form that the Jobs API has, without what may follow the host."""
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
        secret = bool(parts.username or parts.password)
        good = good and not parts.query and not parts.fragment and (parts.port or 1) > 0
    except ValueError:
        good, secret = False, False
    if secret:
        raise ConfigError("--address", "holds a user or password", "The token is the password")
    if not good:
        raise ConfigError(
            "--address",
            f"must be the address of Ray's Jobs API, such as http://HEAD:8265 (got {address!r})",
        )
    return address.rstrip("/")


def _job(details: Any) -> Job:
    labels: Mapping[str, str] = details.metadata or {}
    return Job(
        id=str(details.submission_id),
        **{name: str(labels.get(label, "")) for name, label in _LABELS.items()},
        status=str(details.status.value),
        started=(details.start_time or 0) / 1000,
        exit_code=details.driver_exit_code,
        message=str(details.message or ""),
    )
