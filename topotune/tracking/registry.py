"""Puts an exported model into MLflow's model registry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from topotune.errors import TrackingError
from topotune.tracking.mlflow import MlflowStore, translated
from topotune.tracking.store import RunMissingError

_FOLDER = "model"


def register_model(
    store: MlflowStore, run_id: str, files: Sequence[Path], name: str, alias: str
) -> str:
    """Keep files with a run and register them as a new version of a model.

    Args:
        store: the store that holds the run.
        run_id: the trial's run.
        files: weights, config and model card; they become the run's artifacts under ``model``.
        name: the registered model's name; made where it is missing.
        alias: the alias that this version gets, taken from the version that has it now.

    Returns:
        The new version.

    Raises:
        TrackingError: the registry refuses the name or the alias, or the store has no such run.
        StoreOfflineError: the store cannot be reached now.
    """
    query = f"name = '{_plain(name)}'"
    client = store.client()
    try:
        for path in files:
            store.log_artifact(run_id, path, _FOLDER)
        with translated():
            if not client.search_registered_models(query, max_results=1):
                client.create_registered_model(name)
            made = client.create_model_version(name, f"runs:/{run_id}/{_FOLDER}", run_id)
            client.set_registered_model_alias(name, alias, made.version)
    except RunMissingError as error:
        raise TrackingError(
            f"model {name!r}: run {run_id} is not in {store.label}: {error}. Ship the search "
            "first with 'topotune sync'"
        ) from None
    return str(made.version)


def _plain(name: str) -> str:
    if not name or any(c in name for c in "'\"\\/:") or not name.isprintable():
        raise TrackingError(
            f"model name {name!r}: quotes, slashes, colons and control characters are not allowed. "
            "Use letters, digits, spaces, '-', '_' and '.'"
        )
    return name
