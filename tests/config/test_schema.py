"""The JSON schema of a search file describes every form that check takes, and editors find it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.config.test_file import BASE, changed
from topotune.cli.main import app
from topotune.config.file import parse_search, read_yaml
from topotune.config.models import SearchConfig, json_schema
from topotune.config.spaces import SCHEMA_FILE, shipped_folder, shipped_spaces
from topotune.errors import ConfigError

VALIDATOR = jsonschema.Draft202012Validator(json_schema())
SHIPPED = shipped_spaces()


def taken(data: object) -> bool:
    """Whether check's model accepts the data."""
    try:
        parse_search(data, "f.yaml", {})
    except ConfigError:
        return False
    return True


def test_it_is_a_schema_with_every_key() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert set(json_schema()["properties"]) == set(SearchConfig.model_fields)


@pytest.mark.parametrize("path", SHIPPED.values(), ids=SHIPPED)
def test_shipped_files_are_valid_and_name_the_schema(path: Path) -> None:
    VALIDATOR.validate(read_yaml(path)[0])
    head, place = path.read_text(encoding="utf-8").splitlines()[0].split("=")
    assert head == "# yaml-language-server: $schema"
    assert json.loads((path.parent / place).read_text(encoding="utf-8")) == json_schema()


def test_the_shipped_schema_is_the_models_own(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["schema", "--out", str(tmp_path / "schema.json")])
    assert done.exit_code == 0
    written = (tmp_path / "schema.json").read_text(encoding="utf-8")
    shipped = (shipped_folder() / SCHEMA_FILE).read_text(encoding="utf-8")
    assert written == shipped, f"write it anew: topotune schema --out search_spaces/{SCHEMA_FILE}"
    assert json.loads(CliRunner().invoke(app, ["schema"]).stdout) == json_schema()


SHORT: list[tuple[Any, ...]] = [
    ("task", "mnist5k"),
    ("task", {"name": "mnist5k", "options": {"val_fraction": 0.1, "sizes": [1, 2.5]}}),
    ("model", "convnet"),
    ("model", {"options": {"hidden": 8}}),
    ("sampler", "tpe"),
    ("sampler", {"name": "qmc"}),
    ("pruner", "none"),
    ("pruner", "successive_halving"),
    ("pruner", {"name": "successive_halving"}),
    ("objective", {"metric": "val_loss", "direction": "minimize"}),
    ("objective", [{"metric": "val_loss", "direction": "minimize"}]),
    ("budget", {"wall_clock": "30m"}),
    ("budget", {"device_seconds": " 1.5 h "}),
    ("budget", {"trials": None, "wall_clock": 30}),
    ("budget", {"trials": "4", "epochs": 3.0}),
    ("limits", {"stall": "90s", "memory": "4GB"}),
    ("limits", {"stall": None, "memory": None}),
    ("limits", {"memory": "1.5 gib"}),
    ("limits", {"memory": "auto"}),
    ("resources", {"gpus": "auto", "gpu_memory": 0.5, "concurrency": 3, "custom": {"site": 1}}),
    ("space", "lr", "low", "1e-5"),
    ("space", "lr", "log", "on"),
    ("space", "coupling", "choices", ["uniform", "exchange", None, 3, 0.5, True]),
    ("space", "eta", "when", {"coupling": ["uniform", "exchange"]}),
    ("fixed", {"betas": [0.9, 0.999], "foreach": None, "model.hidden": 8}),
    ("warm_start", [{"lr": 1e-3, "coupling": "uniform"}]),
    ("constraints", {"overhead_vs_adam": {"max": 2, "min": None}}),
    ("study", {"uri": None}),
]


@pytest.mark.parametrize("change", SHORT, ids=str)
def test_every_form_that_check_takes_is_valid(change: tuple[Any, ...]) -> None:
    assert taken(changed(*change))
    VALIDATOR.validate(changed(*change))


CLEAR_FAULTS: list[tuple[Any, ...]] = [
    ("bugdet", {}),
    ("budget", "trails", 3),
    ("budget", ...),
    ("budget", {}),
    ("budget", {"trials": None}),
    ("budget", "trials", True),
    ("budget", "trials", 0),
    ("budget", "trials", "four"),
    ("budget", "epochs", 2.5),
    ("budget", "wall_clock", "10 parsecs"),
    ("limits", {"stall": 0.5}),
    ("limits", {"memory": "4 elephants"}),
    ("sampler", "tpee"),
    ("sampler", {"name": "tpee"}),
    ("sampler", 3),
    ("pruner", "ahsa"),
    ("task", 2024),
    ("name", 2024),
    ("name", "../x"),
    ("method", ["adam"]),
    ("objective", []),
    ("objective", {"metric": "val_loss", "direction": "down"}),
    ("space", {}),
    ("space", "lr", [1e-4, 1e-2]),
    ("space", "lr", {"low": 1, "high": 2}),
    ("space", "lr", "type", "loguniform"),
    ("space", "lr", "log", "perhaps"),
    ("space", "lr", "low", True),
    ("space", "a.b", {"type": "int", "low": 1, "high": 2}),
    ("space", "coupling", "choices", [[1, 2]]),
    ("space", "coupling", "choices", []),
    ("fixed", {"betas": [[0.9]]}),
    ("fixed", {"betas": [True]}),
    ("warm_start", [{"lr": [1]}]),
    ("constraints", {"overhead_vs_adam": {}}),
    ("resources", {"gpus": -1}),
    ("resources", {"gpu_memory": 1.1}),
    ("resources", {"custom": {"site": True}}),
    ("train", {"schedule": "cosin"}),
    ("keep_checkpoints", 0),
    ("seed", -1),
]


@pytest.mark.parametrize("change", CLEAR_FAULTS, ids=str)
def test_clear_faults_are_refused_by_both(change: tuple[Any, ...]) -> None:
    assert not taken(changed(*change))
    assert not VALIDATOR.is_valid(changed(*change))


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(-2, 2e9).filter(math.isfinite),
    st.text("0123456789.eE+-_ msdhGMBik", max_size=6),
    st.sampled_from(
        [
            "auto",
            "tpe",
            "none",
            "random",
            "cosine",
            "minimize",
            "val_loss",
            "adam",
            "yes",
            "OFF",
            "30m",
            "4GB",
            "t",
        ]
    ),
    st.sampled_from(["uniform", "exchange", "0x1f", "1_000", " 7 ", "5.0", "model.hidden"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "options", "max", "lr", "coupling"]), inner)
    ),
    max_leaves=4,
)
FULL: dict[str, Any] = {
    **BASE,
    "description": "all blocks",
    "task": {"name": "digits", "options": {"val_fraction": 0.2}, "download": True},
    "model": {"name": "mlp", "options": {"hidden": 8}},
    "train": {"batch_size": 32, "schedule": "cosine", "grad_clip": 1.0},
    "fixed": {"betas": [0.9, 0.99], "amsgrad": False},
    "warm_start": [{"lr": 1e-3, "coupling": "uniform"}],
    "constraints": {"overhead_vs_adam": {"max": 2.5}},
    "sampler": {"name": "tpe", "startup_trials": 4},
    "pruner": {"name": "asha", "min_epochs": 1, "reduction_factor": 3},
    "budget": {"trials": 4, "epochs": 5, "wall_clock": "20m", "device_seconds": None},
    "limits": {"stall": "30m", "memory": "4GB"},
    "resources": {"cpus": 1, "gpus": 0.5, "custom": {"site": 1}, "concurrency": 2, "priority": 2},
    "overhead": {"blocks": 3, "steps": 1, "warmup": 1},
    "tracking": {"experiment": "x"},
    "keep_checkpoints": 3,
    "seed": 4,
}


def places(data: Any, here: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in nested data."""
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    return [here, *(place for key in keys for place in places(data[key], (*here, key)))]


@settings(max_examples=600, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(places(FULL)[1:]), VALUES), min_size=1, max_size=2))
def test_what_the_model_accepts_the_schema_accepts(
    changes: list[tuple[tuple[Any, ...], Any]],
) -> None:
    data = copy.deepcopy(FULL)
    for place, value in changes:
        block: Any = data
        try:
            for key in place[:-1]:
                block = block[key]
            block[place[-1]] = value
        except (TypeError, IndexError, KeyError):
            return  # the first change removed the place of the second
    if taken(data):
        errors = [f"{list(error.path)}: {error.message}" for error in VALIDATOR.iter_errors(data)]
        assert not errors, data
