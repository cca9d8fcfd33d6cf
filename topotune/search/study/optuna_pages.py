"""optuna-dashboard over a search's study: on this machine only, and without a way to change it.

It can delete studies and end trials, which would pull the ground from under a running search. So
its server here passes on what asks and refuses what changes, and what it serves is opened read-only
as well. It runs in this process: no password of a database is on a command line.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from topotune.config.models import SearchConfig
from topotune.errors import ConfigError, SearchFolderError
from topotune.requirements import install_command
from topotune.search.place.addresses import study_place
from topotune.search.place.folder import STUDY_FILE, SearchFolder, searches
from topotune.search.study.address import study_name
from topotune.search.study.storage import reading
from topotune.tracking.serve import HOST, StopRequest, check_port, free_port, stop_signals

if TYPE_CHECKING:
    from collections.abc import Iterator
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

PORT = 8080
_READS = ("GET", "HEAD")
_HERE = (HOST, "localhost", "::1")


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Requests are not logged."""


class ReadOnly:
    """A web application behind which nothing can be changed, nor read through another name.

    Args:
        app: the application.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Pass on, or answer 403 with a reason, which the page shows."""
        if environ["REQUEST_METHOD"] not in _READS:
            reason = "read-only: topotune shows the study; 'topotune stop' and 'extend' change it"
        elif urlsplit(f"//{environ.get('HTTP_HOST', HOST)}").hostname not in _HERE:
            reason = "only for this machine: open it by its address 127.0.0.1"
        else:
            return self._app(environ, start_response)
        body = json.dumps({"reason": reason}).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start_response("403 Forbidden", headers)
        return [body]


def serve(results_dir: Path, name: str | None, port: int, say: Callable[[str], None]) -> None:
    """Serve a search's study until interrupted, and say where to look.

    Args:
        results_dir: where searches lie.
        name: the search; None where there is only one.
        port: preferred port; another one is taken if it is in use. 0 for any free one.
        say: called with a line that says where to look.

    Raises:
        UserError: no such search, no study of it yet, no port, or no optuna-dashboard installed.
        ResourceError: the study cannot be reached.
    """
    check_port(port)
    folder = SearchFolder.open(results_dir, name or _only_search(results_dir))
    with suppress(StopRequest), stop_signals(), serving(folder, folder.config(), port) as address:
        say(f"optuna-dashboard of {folder.name}: {address}")
        say("read-only; Ctrl-C ends it")
        threading.Event().wait()


@contextmanager
def serving(folder: SearchFolder, config: SearchConfig, port: int) -> Iterator[str]:
    """Serve a search's study inside of a ``with`` block; gives the address of the study's page.

    Raises:
        UserError: no study of it yet, no port, or no optuna-dashboard installed.
        ResourceError: the study cannot be reached.
    """
    make_app = _optuna_dashboard()
    if config.study.uri is None and not (folder.root / STUDY_FILE).is_file():
        raise SearchFolderError(f"{study_place(folder, config)}: is missing: no trial has begun")
    with reading(folder, config) as storage:
        try:
            study = storage.get_study_id_from_name(study_name(folder, config))
        except KeyError:
            raise SearchFolderError(
                f"{study_place(folder, config)}: holds no study of search {folder.name!r}"
            ) from None
        app = ReadOnly(make_app(storage))
        server = make_server(HOST, free_port(port), app, _Server, _Silent)
        thread = threading.Thread(target=server.serve_forever, name="optuna-dashboard")
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}/dashboard/studies/{study}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _only_search(results_dir: Path) -> str:
    names = [folder.name for folder in searches(results_dir)]
    if len(names) == 1:
        return names[0]
    known = ", ".join(names) or "none"
    raise SearchFolderError(
        f"{results_dir}: --optuna shows the study of one search (there: {known}). Name it: "
        "topotune dashboard NAME --optuna"
    )


def _optuna_dashboard() -> Callable[[Any], WSGIApplication]:
    """Its function that makes an application of a storage."""
    try:
        from optuna_dashboard import wsgi
    except ImportError:
        raise ConfigError(
            "--optuna",
            "needs the package optuna-dashboard, which is not installed",
            f"Install it: {install_command('optuna-dashboard')}",
        ) from None
    make: Callable[[Any], WSGIApplication] = wsgi
    return make
