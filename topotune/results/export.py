"""Write a trial as a folder that trains again, loads, and says where it comes from.

A folder appears complete or not at all: it is built beside its place under a hidden name and
moved there at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topotune.errors import ConfigError, ResourceError
from topotune.files import make_folder, sync_folder
from topotune.records import EpochReport, TrialSpec, TrialSummary
from topotune.results.card import CardFacts, Provenance, model_card
from topotune.results.ranking import check_directions, is_finished
from topotune.results.text import clean, strict_json
from topotune.results.yamltext import dump_yaml

if TYPE_CHECKING:
    from torch import Tensor

_CONFIG, _METRICS, _PROVENANCE = "config.yaml", "metrics.json", "provenance.json"
_WEIGHTS, _CARD = "model.safetensors", "README.md"
_FILES = (_CONFIG, _METRICS, _PROVENANCE, _WEIGHTS, _CARD)


@dataclass(frozen=True)
class ExportPaths:
    """The folder of one exported trial and the files in it."""

    folder: Path
    config: Path
    metrics: Path
    provenance: Path
    weights: Path
    card: Path

    @classmethod
    def under(cls, folder: Path) -> ExportPaths:
        """The paths that an export into ``folder`` has."""
        return cls(
            folder,
            folder / _CONFIG,
            folder / _METRICS,
            folder / _PROVENANCE,
            folder / _WEIGHTS,
            folder / _CARD,
        )


def export_config(
    summary: TrialSummary,
    rank: int,
    *,
    objectives: Mapping[str, str],
    out: Path,
    weights: Mapping[str, Tensor],
    provenance: Provenance,
    history: Sequence[EpochReport] = (),
    test_metrics: Mapping[str, float] | None = None,
    force: bool = False,
) -> ExportPaths:
    """Write ``out/rank-<rank>-trial-<number>/`` with config, metrics, provenance, weights, card.

    The same export twice is one export: only the provenance may differ (it holds a date), and the
    first one stays.

    Args:
        summary: the trial, with the resolved spec it ran under.
        rank: its place in the leaderboard, from 1.
        objectives: metric name to "maximize" or "minimize", as many as the summary has values.
        out: made if it is missing.
        weights: the model's state dict; tensors may be shared, strided or on a GPU.
        provenance: where the trial comes from.
        history: all epochs' reports, if known.
        test_metrics: metrics on the test split, if it was opened.
        force: replace an earlier, different export of the same name; a folder that holds other
            files is refused all the same.

    Raises:
        ConfigError: the trial cannot be exported, or the place is taken.
        ResourceError: the folder cannot be written; nothing is left there.
    """
    spec = _spec_of(summary, objectives)
    tensors = _dense(weights, summary.number)
    facts = CardFacts(
        summary=summary,
        spec=spec,
        rank=rank,
        objectives=objectives,
        provenance=provenance,
        tensors=len(tensors),
        values=sum(tensor.numel() for tensor in tensors.values()),
        test_metrics=test_metrics or {},
    )
    texts = {
        _CONFIG: _config_text(spec, summary, rank, provenance),
        _METRICS: _json_text(_metrics(facts, history), "metrics"),
        _PROVENANCE: _json_text(provenance.to_dict(summary, rank), "provenance"),
        _CARD: model_card(facts),
    }
    place = out / f"rank-{rank}-trial-{summary.number:04d}"
    part = out / f".{place.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        make_folder(out)
        _bring_back(place)
        part.mkdir()
        _fill(part, texts, tensors)
        if place.exists() and _same(part, place):
            shutil.rmtree(part)
        else:
            _refuse_if_taken(place, force)
            _swap(part, place)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ResourceError(
            f"{place}: the export cannot be written: {error.strerror or error}. "
            "Free space or choose a folder that can be written"
        ) from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return ExportPaths.under(place)


def _spec_of(summary: TrialSummary, objectives: Mapping[str, str]) -> TrialSpec:
    """The trial's spec, if the trial is one that can be exported."""
    place = f"trial {summary.number}"
    check_directions(list(objectives.values()))
    if not summary.spec:
        raise ConfigError(place, "has no resolved configuration, it never started")
    if not is_finished(summary, list(objectives.values())):
        values = ", ".join(map(repr, summary.values)) or "no value"
        raise ConfigError(
            place,
            f"is {summary.state} with {values} for {', '.join(objectives)}",
            "Export a trial that is COMPLETE with finite objectives",
        )
    try:
        return TrialSpec.from_dict(summary.spec)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}: configuration", str(error)) from error


def _config_text(spec: TrialSpec, summary: TrialSummary, rank: int, source: Provenance) -> str:
    title = f"Trial {summary.number} of search {clean(source.search)}, rank {rank}."
    head = f"# {title}\n# Train it again:  topotune train config.yaml\n"
    return head.encode("ascii", "backslashreplace").decode() + dump_yaml(spec.to_dict())


def _metrics(facts: CardFacts, history: Sequence[EpochReport]) -> dict[str, Any]:
    trial = facts.summary
    pairs = zip(facts.objectives.items(), trial.values, strict=True)
    return {
        "trial": trial.number,
        "rank": facts.rank,
        "objectives": [{"metric": m, "direction": d, "value": v} for (m, d), v in pairs],
        "outcome": trial.state,
        "reason": trial.reason,
        "violated": trial.violated,
        "epochs": trial.epochs,
        "device_seconds": trial.device_seconds,
        "metrics": trial.metrics,
        "test_metrics": facts.test_metrics,
        "curve": {epoch: trial.curve[epoch] for epoch in sorted(trial.curve)},
        "history": [report.to_dict() for report in history],
    }


def _json_text(data: Mapping[str, Any], place: str) -> str:
    return json.dumps(strict_json(data, place), allow_nan=False, indent=2) + "\n"


def _dense(weights: Mapping[str, Tensor], trial: int) -> dict[str, Tensor]:
    """Copies on the CPU, one storage each: the format knows neither sharing nor strides."""
    import torch

    if not weights:
        raise ConfigError(f"trial {trial}: weights", "empty, there is nothing to save")
    for name, tensor in weights.items():
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ConfigError(
                f"trial {trial}: weights: {name}",
                f"a {tensor.layout} {tensor.dtype} tensor cannot be saved as safetensors",
                "Convert it to a dense tensor",
            )
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}


def _fill(folder: Path, texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write all files and wait until they are on the disk."""
    from safetensors.torch import save

    for name, text in texts.items():
        _write(folder / name, text.encode())
    # one key of metadata: several would come in an order of their own at every call
    _write(folder / _WEIGHTS, save(dict(tensors), metadata={"format": "pt"}))
    sync_folder(folder)


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _same(part: Path, place: Path) -> bool:
    """Whether an existing folder is this very export, its provenance apart."""
    if not place.is_dir() or {entry.name for entry in place.iterdir()} != set(_FILES):
        return False
    compared = [name for name in _FILES if name != _PROVENANCE]
    return all((part / name).read_bytes() == (place / name).read_bytes() for name in compared)


def _refuse_if_taken(place: Path, force: bool) -> None:
    if not place.exists() and not place.is_symlink():
        return
    if place.is_symlink() or not place.is_dir():
        raise ConfigError(str(place), "exists and is no folder", "Choose another output folder")
    foreign = sorted(entry.name for entry in place.iterdir() if entry.name not in _FILES)
    if foreign:
        raise ConfigError(
            str(place),
            f"holds files that no export wrote ({clean(', '.join(foreign), 80)})",
            "Choose another output folder",
        )
    if not force:
        raise ConfigError(
            str(place),
            "already holds a different export",
            "Choose another output folder, or replace it with --force",
        )


def _swap(part: Path, place: Path) -> None:
    """Move the new folder into place; an old one comes back if that fails or is interrupted."""
    old = part.with_suffix(".old")
    try:
        if place.exists():
            place.replace(old)
        part.replace(place)
    except BaseException:
        if old.exists() and part.exists():
            old.replace(place)
        raise
    sync_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _bring_back(place: Path) -> None:
    """Give an export its name back that was killed between the two renames of its replacement."""
    if place.exists() or place.is_symlink():
        return
    for old in sorted(place.parent.glob(f".{place.name}.*.old")):
        if old.is_dir() and not old.is_symlink():
            old.replace(place)
            return
