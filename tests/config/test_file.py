"""Search files: what is accepted, and how each mistake is named."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from topotune.config.file import load_search, load_spec, parse_search, parse_yaml, read_yaml
from topotune.config.models import SearchConfig, json_schema
from topotune.errors import ConfigError, TopotuneError
from topotune.records import TrialSpec

SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))

BASE: dict[str, Any] = {
    "name": "demo",
    "task": "digits",
    "method": "topological_adam",
    "space": {
        "lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
        "coupling": {"type": "categorical", "choices": ["uniform", "exchange"]},
        "eta": {"type": "float", "low": 0.01, "high": 0.5, "when": {"coupling": "exchange"}},
        "depth": {"type": "int", "low": 1, "high": 4},
    },
    "objective": {"metric": "val_accuracy", "direction": "maximize"},
    "budget": {"trials": 4},
}


def changed(*path_and_value: Any) -> dict[str, Any]:
    """BASE with one value changed, or removed where the value is ``...``."""
    *path, value = path_and_value
    data = copy.deepcopy(BASE)
    block = data
    for key in path[:-1]:
        block = block.setdefault(key, {})
    if value is ...:
        del block[path[-1]]
    else:
        block[path[-1]] = value
    return data


def load(data: object, tmp_path: Path) -> SearchConfig:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return load_search(path)


@pytest.mark.parametrize("path", SPACES, ids=lambda p: p.stem)
def test_shipped_space_loads_under_its_own_name(path: Path) -> None:
    assert load_search(path).name == path.stem


def test_each_topological_space_has_an_equal_budget_baseline() -> None:
    names = {path.stem for path in SPACES}
    topological = {name for name in names if name.startswith("topological_adam_")}
    assert len(topological) == 6
    for name in topological:
        ours = load_search(SPACES[0].parent / f"{name}.yaml")
        base = load_search(SPACES[0].parent / f"{name.removeprefix('topological_')}.yaml")
        for block in ("task", "model", "train", "budget", "objective", "pruner", "sampler", "seed"):
            assert getattr(ours, block) == getattr(base, block), (name, block)


def test_short_forms_and_defaults(tmp_path: Path) -> None:
    config = load({**BASE, "sampler": "random", "pruner": "median"}, tmp_path)
    assert config.task.name == "digits"
    assert config.sampler.name == "random"
    assert config.pruner.name == "median"
    assert config.objective[0].metric == "val_accuracy"
    assert config.budget.epochs == 5


def test_several_objectives_default_to_no_pruning(tmp_path: Path) -> None:
    goals = [
        {"metric": "val_accuracy", "direction": "maximize"},
        {"metric": "overhead_vs_adam", "direction": "minimize"},
    ]
    assert load(changed("objective", goals), tmp_path).pruner.name == "none"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1.5h", 5400), ("2d", 172800), (45, 45)]
)
def test_durations(text: object, seconds: float, tmp_path: Path) -> None:
    assert load(changed("budget", "wall_clock", text), tmp_path).budget.wall_clock == seconds


BAD: list[tuple[tuple[Any, ...], str, tuple[str, ...]]] = [
    (("bugdet", {}), "bugdet", ("unknown key", "'budget'")),
    (("budget", "trails", 3), "budget.trails", ("unknown key", "'trials'")),
    (("budget", {}), "budget", ("needs an end",)),
    (("budget", ...), "budget", ("is required",)),
    (("budget", "wall_clock", "10 parsecs"), "budget.wall_clock", ("10 parsecs",)),
    (("sampler", "tpee"), "sampler", ("unknown sampler", "'tpe'")),
    (("pruner", "ahsa"), "pruner", ("unknown pruner", "'asha'")),
    (("space", "lr", "low", 0.1), "space.lr", ("low must be below high", "low=0.1")),
    (("space", "lr", "low", 0.0), "space.lr", ("log needs low above 0",)),
    (("space", "lr", "low", math.inf), "space.lr", ("finite",)),
    (("space", "lr", "type", "flaot"), "space.lr", ("unknown parameter type", "'float'")),
    (("space", "lr", {"low": 1, "high": 2}), "space.lr", ("needs a type",)),
    (("space", "lr", "step", 0.1), "space.lr", ("log and step exclude",)),
    (("space", {}), "space", ("at least one parameter",)),
    (("space", "eta", "when", {"copling": "x"}), "space.eta.when.copling", ("'coupling'",)),
    (("space", "eta", "when", {"coupling": "spin"}), "space.eta.when.coupling", ("never takes",)),
    (("space", "coupling", "when", {"eta": 0.1}), "space.", ("circle",)),
    (("space", "train.batchsize", {"type": "int", "low": 1, "high": 2}), "space.", ("batch_size",)),
    (("space", "a.b", {"type": "int", "low": 1, "high": 2}), "space.a.b", ("prefix",)),
    (("warm_start", [{"lr": 5.0}]), "warm_start[0].lr", ("outside",)),
    (("warm_start", [{"lrr": 5.0}]), "warm_start[0].lrr", ("unknown parameter", "'lr'")),
    (("warm_start", [{"depth": 1.5}]), "warm_start[0].depth", ("outside",)),
    (("warm_start", [{"depth": True}]), "warm_start[0].depth", ("outside",)),
    (("space", "coupling", "choices", [1, True]), "space.coupling", ("differ",)),
    (("fixed", {"lr": 0.1}), "fixed.lr", ("fixed and in space",)),
    (("objective", []), "objective", ("at least 1",)),
    (("name", "../x"), "name", ("letters",)),
    (("name", "a" * 101), "name", ("100",)),
    (("name", "mlflow"), "name", ("'mlflow'", "topotune itself", "another name")),
    (("name", "MLflow"), "name", ("'MLflow'",)),
    (("name", "address"), "name", ("'address'",)),
    (("resources", {"gpus": -1}), "resources.gpus", ("'auto'", "greater than or equal to 0")),
    (("resources", {"gpus": 1.5}), "resources.gpus", ("shares one GPU", "got 1.5", "1 or 2")),
    (("resources", {"gpus": math.inf}), "resources.gpus", ("finite",)),
    (("resources", {"gpu_memory": 0}), "resources.gpu_memory", ("'auto'", "greater than 0")),
    (("resources", {"gpu_memory": 1.1}), "resources.gpu_memory", ("less than or equal to 1",)),
    (("resources", {"custom": {"GPU": 1}}), "resources.custom", ("'GPU'", "Ray's own")),
    (("resources", {"custom": {"site": 0}}), "resources.custom", ("greater than 0",)),
    (("resources", {"priority": 0}), "resources.priority", ("greater than or equal to 1",)),
    (("resources", {"priority": 101}), "resources.priority", ("less than or equal to 100",)),
    (("constraints", {"overhead_vs_adam": {}}), "constraints.overhead_vs_adam", ("max or min",)),
    (("method", ["adam"]), "method", ("string",)),
    (("seed", -1), "seed", ("greater than or equal to 0",)),
]


@pytest.mark.parametrize(("change", "place", "words"), BAD, ids=lambda v: str(v)[:40])
def test_mistakes_are_named_with_file_line_place_and_rule(
    change: tuple[Any, ...], place: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(changed(*change), tmp_path)
    text = str(caught.value)
    file, line, rest = text.split(":", 2)
    assert file.endswith("space.yaml")
    assert line.isdecimal()
    assert rest.strip().startswith(place)
    for word in words:
        assert word in text


def test_the_line_is_the_offending_keys_own(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "name: demo\ntask: digits\nmethod: adam\nspace:\n"
        "  lr: {type: float, low: 1e-4, high: 1e-2}\n"
        "  eps:\n    type: float\n    low: 3.0\n    high: 2.0\n"
        "objective: {metric: val_accuracy, direction: maximize}\nbudget: {trials: 2}\n"
    )
    with pytest.raises(ConfigError, match=r"space\.yaml:6: space\.eps: low must be below high"):
        load_search(path)


def test_rules_between_blocks(tmp_path: Path) -> None:
    two = [
        {"metric": "a", "direction": "maximize"},
        {"metric": "b", "direction": "minimize"},
    ]
    with pytest.raises(ConfigError, match="pruner: none"):
        load({**BASE, "objective": two, "pruner": "asha"}, tmp_path)
    with pytest.raises(ConfigError, match="takes one objective"):
        load({**BASE, "objective": two, "sampler": "cmaes"}, tmp_path)
    with pytest.raises(ConfigError, match="needs a step"):
        load({**BASE, "sampler": "grid", "space": {"lr": BASE["space"]["lr"]}}, tmp_path)
    with pytest.raises(ConfigError, match=r"overhead\.blocks is 0"):
        load(
            {**BASE, "overhead": {"blocks": 0}, "constraints": {"overhead_vs_adam": {"max": 2}}},
            tmp_path,
        )
    with pytest.raises(ConfigError, match="nothing is ever pruned"):
        load({**BASE, "pruner": {"name": "asha", "min_epochs": 9}}, tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1e5", 1e5),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("017", 17),
        ("0x1f", 31),
        ("on", "on"),
        ("yes", "yes"),
        ("2026-01-01", "2026-01-01"),
        ("true", True),
        ("~", None),
        ("'1e-3'", "1e-3"),
        ("1_000", "1_000"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    data, _ = parse_yaml(f"x: {text}".encode(), "f")
    assert data == {"x": value}
    assert type(data["x"]) is type(value)


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"a: [1, 2\nb: 3\n", "not YAML"),
        (b"a: 1\na: 2\n", "stands twice"),
        (b'a: 1\nb: "\\uD800"\n', "2: a text with half a character"),
        (b'"\\uDFFF": 1\n', "1: a text with half a character"),
        (b"a: !!python/object/apply:os.system ['true']\n", "not allowed"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"1: 2\n", "must be text"),
        (b"a: &x [1]\nb: " + b"[" * 60 + b"]" * 60, "deeper"),
        (b"\x00", "not YAML"),
        (b"--- a\n--- b\n", "not YAML"),
    ],
)
def test_malformed_yaml(raw: bytes, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_yaml(raw, "f.yaml")


def test_a_file_that_unfolds_to_too_much_is_refused() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="unfolds"):
        parse_yaml("\n".join(rows).encode(), "f.yaml")


def test_missing_file_folder_and_size(tmp_path: Path) -> None:
    (tmp_path / "mnist.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match=r"no such file.*mnist\.yaml"):
        read_yaml(tmp_path / "mnits.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_yaml(tmp_path)
    (tmp_path / "big.yaml").write_text("a: " + "x" * 1_000_001)
    with pytest.raises(ConfigError, match="larger"):
        read_yaml(tmp_path / "big.yaml")
    with pytest.raises(ConfigError, match="mapping"):
        parse_search([1], "f.yaml", {})


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_our_error(raw: bytes) -> None:
    try:
        data, lines = parse_yaml(raw, "f.yaml")
        said = "f.yaml"
        assert data is None or () in lines
    except ConfigError as error:
        said = str(error)
    assert said.startswith("f.yaml")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SearchConfig.model_fields)), _JSON)
def test_any_value_anywhere_gives_a_config_or_our_error(key: str, value: object) -> None:
    try:
        parse_search({**BASE, key: value}, "f.yaml", {})
        said = "f.yaml"
    except TopotuneError as error:
        said = str(error)
    assert said.startswith("f.yaml")


def test_a_config_survives_its_own_json(tmp_path: Path) -> None:
    config = load({**BASE, "warm_start": [{"lr": 1e-3, "coupling": "uniform"}]}, tmp_path)
    assert SearchConfig.model_validate(config.model_dump(mode="json")) == config


def test_schema_names_every_key() -> None:
    assert set(json_schema()["properties"]) == set(SearchConfig.model_fields)


def test_training_config_round_trip_and_mistakes(tmp_path: Path) -> None:
    spec = TrialSpec(task="digits", method="adam", epochs=2, seed=7, params={"lr": 1e-3})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(spec.to_dict()))
    assert load_spec(path) == spec
    path.write_text(yaml.safe_dump({**spec.to_dict(), "epoch": 3}))
    with pytest.raises(ConfigError, match=r"epoch: unknown key 'epoch'.*'epochs'"):
        load_spec(path)
    path.write_text(yaml.safe_dump({**spec.to_dict(), "train": {"batchsize": 3}}))
    with pytest.raises(ConfigError, match="'batch_size'"):
        load_spec(path)
    path.write_text(yaml.safe_dump(BASE))
    with pytest.raises(ConfigError, match="topotune search"):
        load_spec(path)


def test_half_a_character_in_a_saved_search_is_refused() -> None:
    data, _ = read_yaml(SPACES[0].with_name("topological_adam_digits.yaml"))
    data["space"]["coupling"]["choices"][1] = "\ud800"
    with pytest.raises(ConfigError, match=r"search\.json: a text with half a character"):
        parse_search(data, "search.json", {})
