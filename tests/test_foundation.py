"""Errors, records, plug-ins and seeds."""

from __future__ import annotations

import json
import math
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topotune.errors import ConfigError, PluginError, UnknownNameError
from topotune.plugins import load_class, load_object
from topotune.records import (
    EpochReport,
    Outcome,
    OverheadOptions,
    TrainOptions,
    TrialResult,
    TrialSpec,
    TrialSummary,
)
from topotune.seeding import derive_seed, seed_everything

FLOATS = st.floats(allow_nan=True, allow_infinity=True)
METRICS = st.dictionaries(st.text(min_size=1, max_size=8), FLOATS, max_size=4)


def same(left: object, right: object) -> bool:
    return repr(left) == repr(right)


@given(METRICS, FLOATS)
def test_reports_survive_strict_json(metrics: dict[str, float], seconds: float) -> None:
    report = EpochReport(3, 12, metrics, 0.5, 1_700_000_000_000)
    text = report.to_json()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not strict JSON"))
    back = EpochReport.from_json(text)
    assert same(dict(sorted(back.metrics.items())), dict(sorted(metrics.items())))
    assert (back.epoch, back.step, back.seconds) == (3, 12, 0.5)
    result = TrialResult(Outcome.DIVERGED, "why", (report,), metrics)
    assert same(TrialResult.from_json(result.to_json()).history[0].epoch, 3)
    row = TrialSummary(1, "COMPLETE", values=(seconds,), curve={1: seconds}, metrics=metrics)
    assert same(TrialSummary.from_json(row.to_json()).values, (seconds,))
    assert same(TrialSummary.from_json(row.to_json()).curve, {1: seconds})


def test_a_spec_survives_json_with_its_nested_options() -> None:
    spec = TrialSpec(
        task="digits",
        method="adam",
        epochs=3,
        seed=5,
        params={"lr": 1e-3, "betas": [0.9, 0.99]},
        train=TrainOptions(batch_size=7, schedule="cosine"),
        overhead=OverheadOptions(blocks=0),
    )
    assert TrialSpec.from_json(spec.to_json()) == spec
    with pytest.raises(TypeError):
        TrialSpec.from_json(json.dumps({**spec.to_dict(), "epoch": 3}))
    with pytest.raises(ValueError, match="JSON object"):
        TrialSpec.from_json("[1]")


def test_messages_name_place_value_rule_and_fix_and_survive_a_process_boundary() -> None:
    error = ConfigError("space.lr", "low must be below high (got 2, 1)", "Swap them")
    assert str(error) == "space.lr: low must be below high (got 2, 1). Swap them"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    unknown = UnknownNameError("task", "mnst", ["mnist", "digits"])
    assert "did you mean 'mnist'?" in str(unknown)
    assert str(pickle.loads(pickle.dumps(unknown))) == str(unknown)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("json", "package.module:Name"),
        ("nowhere_at_all:X", "does not import"),
        ("json:JSONDecodr", "JSONDecoder"),
        (":X", "package.module:Name"),
    ],
)
def test_bad_import_paths(path: str, word: str) -> None:
    with pytest.raises(PluginError, match=word):
        load_object(path)


def test_plugins_load_from_the_current_directory_and_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_plugin_module.py").write_text("class Ours(dict): pass\nraised = 1\n")
    (tmp_path / "my_broken_module.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert load_class("my_plugin_module:Ours", dict)().__class__.__name__ == "Ours"
    with pytest.raises(PluginError, match=r"subclass of builtins\.list"):
        load_class("my_plugin_module:Ours", list)
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        load_object("my_broken_module:X")


def test_seeds_differ_and_repeat() -> None:
    seeds = {derive_seed(s, t, r) for s in range(5) for t in range(20) for r in range(3)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2) == derive_seed(1, 2, 0)

    def draws() -> tuple[float, float, float]:
        seed_everything(derive_seed(0, 1))
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draws() == draws()
    assert not any(math.isnan(value) for value in draws())
