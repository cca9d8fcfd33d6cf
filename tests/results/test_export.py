"""Export: what is written is read back, by readers that are not ours."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors import safe_open
from safetensors.torch import load_file

from topotune.errors import ConfigError, ResourceError
from topotune.records import EpochReport, TrainOptions, TrialSpec, TrialSummary
from topotune.results.card import Provenance
from topotune.results.export import ExportPaths, export_config
from topotune.results.verify import verify

SPEC = TrialSpec(
    task="digits",
    method="topological_adam",
    epochs=3,
    seed=2**62 + 12345,
    params={"lr": 1e-05, "eta": 0.1 + 0.2, "betas": [0.9, 0.999], "coupling": "exchange"},
    model_options={"hidden": 64},
    train=TrainOptions(batch_size=32, schedule="cosine", grad_clip=None),
    data_dir="1e3",
)
SUMMARY = TrialSummary(
    number=7,
    state="COMPLETE",
    params={"lr": 1e-05},
    values=(0.9733333333333334,),
    metrics={"val_accuracy": 0.9733333333333334, "overhead_vs_adam": 1.083, "odd": math.nan},
    curve={2: 0.9, 1: 0.5, 3: 0.9733333333333334},
    epochs=3,
    seed=SPEC.seed,
    device_seconds=4.25,
    spec=SPEC.to_dict(),
)
SOURCE = Provenance(
    search="digits search",
    search_id="0f3a",
    experiment="digits",
    trials=24,
    code_version="0.1.0",
    packages={"torch": "2.11.0"},
    device="cpu (1 thread)",
    created="2030-01-02T03:04:05Z",
)
OBJECTIVES = {"val_accuracy": "maximize"}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(4, 3, generator=generator),
        "layer.bias": torch.tensor([-0.0, 1e-45, math.nan, math.inf]),
    }


def export(out: Path, **changes: Any) -> ExportPaths:
    arguments: dict[str, Any] = {
        "summary": SUMMARY,
        "rank": 1,
        "objectives": OBJECTIVES,
        "weights": weights(),
        "provenance": SOURCE,
    }
    return export_config(out=out, **(arguments | changes))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


# the folder ---------------------------------------------------------------------------------


def test_the_config_loads_to_an_equal_spec(tmp_path: Path) -> None:
    paths = export(tmp_path / "new" / "out")
    assert paths.folder == tmp_path / "new" / "out" / "rank-1-trial-0007"
    text = paths.config.read_text()
    back = TrialSpec.from_dict(yaml.safe_load(text))
    assert back == SPEC
    assert repr(back.to_dict()) == repr(SPEC.to_dict())  # 1 and 1.0 are equal, not the same
    assert text.splitlines()[:2] == [
        "# Trial 7 of search digits search, rank 1.",
        "# Train it again:  topotune train config.yaml",
    ]


def test_metrics_and_provenance_are_strict_json(tmp_path: Path) -> None:
    report = EpochReport(1, 40, {"val_accuracy": 0.5, "loss": math.inf}, 0.1, 1)
    paths = export(tmp_path, history=[report], test_metrics={"accuracy": 0.96})
    metrics = json.loads(paths.metrics.read_text(), parse_constant=pytest.fail)
    objective = {"metric": "val_accuracy", "direction": "maximize", "value": 0.9733333333333334}
    assert metrics["objectives"] == [objective]
    assert metrics["metrics"]["odd"] == "nan"
    assert metrics["curve"] == {"1": 0.5, "2": 0.9, "3": 0.9733333333333334}
    assert list(metrics["curve"]) == ["1", "2", "3"]
    assert metrics["history"] == [report.to_dict()]
    assert metrics["test_metrics"] == {"accuracy": 0.96}
    assert (metrics["outcome"], metrics["trial"], metrics["rank"]) == ("COMPLETE", 7, 1)
    origin = json.loads(paths.provenance.read_text(), parse_constant=pytest.fail)
    assert origin["seed"] == SPEC.seed
    assert origin["search_id"] == "0f3a"
    assert origin["packages"] == {"torch": "2.11.0"}
    assert origin["created"] == "2030-01-02T03:04:05Z"


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    conv = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    given_weights = {
        **weights(),
        "tied": base,
        "tied.again": base,
        "view": base[1:3],
        "transposed": base.t(),
        "strided": base[::2, ::3],
        "expanded": torch.ones(1).expand(3, 4),
        "channels_last": conv,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "bf16": base.to(torch.bfloat16),
        "half": base.half(),
        "double": base.double(),
        "flags": base > 0,
        "negated": torch._neg_view(torch.randn(3)),
        "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
    }
    paths = export(tmp_path, weights=given_weights)
    back = load_file(paths.weights)
    assert back.keys() == given_weights.keys()
    for name, tensor in given_weights.items():
        assert back[name].dtype == tensor.dtype, name
        assert back[name].shape == tensor.shape, name
        assert bits(back[name]) == bits(tensor.detach().resolve_neg().resolve_conj()), name
    with safe_open(paths.weights, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_model_with_tied_weights_loads_strictly(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.last.weight = self.first.weight

    source, copy = Tied(), Tied()
    paths = export(tmp_path, weights=source.state_dict())
    copy.load_state_dict(load_file(paths.weights), strict=True)
    assert torch.equal(copy.last.weight, source.last.weight)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({}, "trial 7: weights: empty"),
        ({"w": torch.eye(2).to_sparse()}, "trial 7: weights: w: .*sparse_coo.*dense"),
    ],
)
def test_weights_that_cannot_be_saved_are_refused(
    tmp_path: Path, bad: Mapping[str, torch.Tensor], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        export(tmp_path / "out", weights=bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"spec": {}}, "trial 7: has no resolved configuration"),
        ({"spec": {"task": "digits", "speed": 1}}, "trial 7: configuration: .*speed"),
        ({"values": ()}, "is COMPLETE with no value for val_accuracy"),
        ({"values": (math.nan,)}, "is COMPLETE with nan"),
        ({"values": (0.5, 0.5)}, "is COMPLETE with 0.5, 0.5"),
        ({"state": "PRUNED"}, "is PRUNED with 0.97"),
        ({"state": "DIVERGED"}, "is DIVERGED"),
    ],
)
def test_a_trial_without_a_result_is_not_exported(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        export(tmp_path / "out", summary=replace(SUMMARY, **changes))
    assert list(tmp_path.iterdir()) == []


# overwriting and failing --------------------------------------------------------------------


def test_the_same_export_twice_keeps_the_first(tmp_path: Path) -> None:
    export(tmp_path)
    before = tree(tmp_path)
    paths = export(tmp_path, provenance=replace(SOURCE, created="2031-01-01T00:00:00Z"))
    assert paths.folder.is_dir()
    assert tree(tmp_path) == before
    assert len(before) == 5


@pytest.mark.parametrize("part", ["weights", "config", "metrics"])
def test_a_different_export_is_refused_and_replaced_by_force(tmp_path: Path, part: str) -> None:
    export(tmp_path)
    before = tree(tmp_path)
    change: dict[str, Any] = {"weights": {"w": torch.ones(2)}}
    if part == "config":
        change = {"summary": replace(SUMMARY, spec=replace(SPEC, epochs=4).to_dict())}
    if part == "metrics":
        change = {"summary": replace(SUMMARY, values=(0.5,))}
    with pytest.raises(ConfigError, match=r"rank-1-trial-0007: already holds.*--force"):
        export(tmp_path, **change)
    assert tree(tmp_path) == before
    export(tmp_path, force=True, **change)
    assert tree(tmp_path).keys() == before.keys()
    assert tree(tmp_path) != before
    assert [p.name for p in tmp_path.iterdir()] == ["rank-1-trial-0007"]


def test_force_never_deletes_files_of_others(tmp_path: Path) -> None:
    folder = export(tmp_path).folder
    (folder / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"files that no export wrote \(notes\.txt\)"):
        export(tmp_path, weights={"w": torch.ones(2)}, force=True)
    assert tree(tmp_path) == before


def test_a_damaged_earlier_export_is_not_taken_for_the_same(tmp_path: Path) -> None:
    paths = export(tmp_path)
    paths.weights.unlink()
    with pytest.raises(ConfigError, match="different export"):
        export(tmp_path)
    export(tmp_path, force=True)
    assert paths.weights.is_file()


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_a_place_that_is_no_folder_is_refused(tmp_path: Path, kind: str) -> None:
    place, elsewhere = tmp_path / "out" / "rank-1-trial-0007", tmp_path / "elsewhere"
    place.parent.mkdir()
    if kind == "file":
        place.write_text("in the way")
    else:
        place.symlink_to(elsewhere)
        if kind == "link":
            elsewhere.mkdir()
    with pytest.raises(ConfigError, match="exists and is no folder"):
        export(tmp_path / "out", force=True)
    assert [p.name for p in place.parent.iterdir()] == [place.name]
    assert not elsewhere.exists() or not any(elsewhere.iterdir())


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match=r"file/out: cannot be created: .*Not a directory"):
        export(tmp_path / "file" / "out")
    assert tree(tmp_path) == {"file": b"in the way"}


def test_a_failed_replacement_brings_the_old_export_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path)
    before = tree(tmp_path)
    rename = Path.replace

    def occupy(self: Path, target: Path) -> Path:
        # another process takes the place between the two renames, so the second one really fails
        if self.suffix == ".tmp":
            (target / "taken").mkdir(parents=True)
            try:
                return rename(self, target)
            finally:
                (target / "taken").rmdir()
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", occupy)
    with pytest.raises(ResourceError, match="not empty"):
        export(tmp_path, weights={"w": torch.ones(2)}, force=True)
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["rank-1-trial-0007"]


def test_an_interrupted_replacement_brings_the_old_export_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path)
    before = tree(tmp_path)
    rename = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path, weights={"w": torch.ones(2)}, force=True)
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["rank-1-trial-0007"]


def test_a_replacement_that_was_killed_half_way_loses_no_export(tmp_path: Path) -> None:
    place = export(tmp_path).folder
    before = tree(tmp_path)
    place.replace(tmp_path / ".rank-1-trial-0007.0123abcd.old")  # and killed there
    with pytest.raises(ConfigError, match="already holds a different export"):
        export(tmp_path, weights={"w": torch.ones(2)})
    assert tree(tmp_path) == before


def test_an_export_is_forced_to_disk_with_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[str] = []
    force = os.fsync

    def watch(handle: int) -> None:
        forced.append(Path(f"/proc/self/fd/{handle}").resolve().name.partition(".tmp")[0][:18])
        force(handle)

    monkeypatch.setattr(os, "fsync", watch)
    export(tmp_path / "out")
    files = ["config.yaml", "metrics.json", "provenance.json", "README.md", "model.safetensors"]
    assert forced == [tmp_path.name[:18], *files, ".rank-1-trial-0007", "out"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """A real limit on the size of files stops the write of the weights half-way."""
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ResourceError, match=r"cannot be written: File too large"):
            export(tmp_path, weights={"w": torch.zeros(100_000)})
        left = list(tmp_path.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert left == []


# the card -----------------------------------------------------------------------------------


def card_text(markdown: str) -> str:
    """The words of the rendered page; fails where a name became markup."""
    words: list[str] = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        assert token.type not in ("html_block", "hr")
        for child in token.children or []:
            assert child.type in ("text", "text_special", "code_inline", "softbreak"), child
            words.append(child.content)
        if token.type == "code_block":
            words.append(token.content)
        words.append(" ")
    return "".join(words)


def test_the_card_states_the_facts(tmp_path: Path) -> None:
    text = card_text(export(tmp_path).card.read_text())
    assert "Rank 1 of 24 trials in the topotune search digits search." in text
    assert "task digits, trained with topological_adam for 3 epochs at batch size 32" in text
    assert "16 numbers in 2 tensors" in text
    assert "val_accuracy (maximize) validation 0.9733" in " ".join(text.split())
    assert "1.08 times a training step" in text
    assert "topotune train config.yaml" in text
    assert "not measured on the test split" in text
    for name, value in (("lr", "1e-05"), ("betas", "[0.9, 0.999]"), ("coupling", "exchange")):
        assert f"{name} {value}" in " ".join(text.split())


def test_the_card_says_what_the_step_was_timed_against(tmp_path: Path) -> None:
    summary = replace(SUMMARY, metrics={"val_accuracy": 0.97, "overhead_vs_bptt": 0.756})
    text = " ".join(card_text(export(tmp_path, summary=summary).card.read_text()).split())
    assert "0.76 times a training step of the same network by backpropagation" in text
    assert "Adam" not in text.partition("Runtime")[2].partition(".")[0]


def test_the_card_gives_a_test_metric_only_if_there_is_one(tmp_path: Path) -> None:
    summary = replace(SUMMARY, violated=("overhead_vs_adam: 1.3 > 1.2",), metrics={})
    card = export(tmp_path, summary=summary, test_metrics={"accuracy": 0.9125}).card
    text = " ".join(card_text(card.read_text()).split())
    assert "accuracy test 0.9125" in text
    assert "not measured on the test split" not in text
    assert "It breaks: overhead_vs_adam: 1.3 > 1.2." in text
    assert "Runtime" not in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "`x` |<script>\n\n# [a](http://b) \x1b[31m \u2028params: {lr: 9}"
    spec = replace(SPEC, task=evil, method=evil, params={evil: evil, "lr": 0.1})
    summary = replace(SUMMARY, spec=spec.to_dict(), violated=(evil,))
    source = replace(SOURCE, search=evil)
    paths = export(tmp_path, summary=summary, provenance=source, objectives={evil: "maximize"})
    text = paths.card.read_text()
    card_text(text)
    assert "\x1b" not in text
    assert TrialSpec.from_dict(yaml.safe_load(paths.config.read_text())) == spec
    assert json.loads(paths.provenance.read_text())["search"] == evil


def test_the_recorded_metric_verifies_after_its_way_through_json(tmp_path: Path) -> None:
    metrics = json.loads(export(tmp_path).metrics.read_text())["metrics"]
    found = verify(metrics, {"val_accuracy": 0.9733333333333334}, "val_accuracy", "cpu")
    assert found.exact
    assert found.difference == 0
    assert (found.metric, found.device) == ("val_accuracy", "cpu")
