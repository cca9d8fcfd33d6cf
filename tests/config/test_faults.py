"""All faults of a search file at once, each with its line, and what to write instead."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from typer.testing import CliRunner

from tests.config.test_file import BASE, changed, load
from topotune.cli.main import app
from topotune.config.file import load_search, parse_search
from topotune.config.models import SearchConfig
from topotune.config.rules import unreached_ends
from topotune.config.space import FloatParam, IntParam, last_value
from topotune.errors import ConfigError, FaultsError, FieldError
from topotune.search.doctor.preflight import preflight
from topotune.search.study.space import corners, suggest

MANY = """\
name: 2024
task: digit
model: {name: convnett, options: {widht: 8}}
method: topological_adm
train: {batchsize: 3}
fixed:
  learning_rate: 0.1
  model.depht: 2
space:
  lr: [1e-4, 1e-2]
  eta: {type: loguniform, low: 1e-3, high: 1}
  mode: {type: categorical, choices: [[0.9, 0.99], [0.8, 0.9]]}
  mu0: {type: float, low: 0.1, high: 1, step: 5}
  w_topo: {type: float, low: 0.1, high: 1, when: {cuopling: exchange}}
  coupling: {type: categorical, choices: [uniform, exchange]}
warm_start:
  - {coupling: lokal}
  - {mu0: 7}
objective: {metric: test_accuracy, direction: maximize}
constraints:
  test_loss: {max: 1}
sampler: bayes
budget: {trials: 3}
pruner: {name: asha, min_epochs: 9}
"""
PLACES = """\
1 name
2 task
3 model.name
3 model.options.widht
4 method
5 train.batchsize
7 fixed.learning_rate
8 fixed.model.depht
10 space.lr
11 space.eta
12 space.mode.choices[0]
12 space.mode.choices[1]
13 space.mu0.step
14 space.w_topo.when.cuopling
17 warm_start[0].coupling
18 warm_start[1].mu0
19 objective.metric
21 constraints.test_loss
22 sampler
24 pruner.min_epochs
"""


def faults_of(text: str, tmp_path: Path, *options: str) -> list[str]:
    """The lines that check prints on standard error."""
    (tmp_path / "f.yaml").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "topotune", "check", "f.yaml", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_all_faults_of_a_file_are_seen_at_once(tmp_path: Path) -> None:
    lines = faults_of(MANY, tmp_path)
    found = [re.match(r"error: f\.yaml:(\d+): ([^ ]+): ", line) for line in lines]
    assert [" ".join(match.groups()) for match in found if match] == PLACES.splitlines()
    text = "\n".join(lines)
    for word in ("'topological_adam'", "'digits'", "'convnet'", "'lr'", "'tpe'", "'batch_size'"):
        assert f"did you mean {word}?" in text
    built = "(task|model|method|fixed)[^ ]*: (unknown|model|topological_adam) "
    assert faults_of(MANY, tmp_path, "--quick") == [
        line for line in lines if not re.match(rf"error: f\.yaml:\d+: {built}", line)
    ]


def check(data: dict[str, Any], tmp_path: Path) -> str:
    """What check says of a file with one fault."""
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    found = CliRunner().invoke(app, ["check", str(tmp_path / "f.yaml")])
    assert isinstance(found.exception, ConfigError), found.output
    return str(found.exception).removeprefix(f"{tmp_path}/")


ADAM: dict[str, Any] = {
    **BASE,
    "method": "adam",
    "space": {"lr": BASE["space"]["lr"]},
    "overhead": {"blocks": 0},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "adm"}, r"f\.yaml:3: method: unknown method 'adm'; did you mean 'adam'\?"),
        ({"method": "no.module:X"}, r"f\.yaml:3: method: import path 'no\.module:X': module"),
        ({"task": "digit"}, r"f\.yaml:2: task: unknown task 'digit'; did you mean 'digits'\?"),
        ({"task": {"name": "digit"}}, r"f\.yaml:3: task\.name: unknown task"),
        ({"task": {"name": "digits", "options": {"val": 1}}}, r"f\.yaml:5: task\.options\.val: "),
        ({"model": "mpl"}, r"f\.yaml:\d+: model: unknown model 'mpl'; did you mean 'mlp'\?"),
        ({"model": {"options": {"hiden": 3}}}, r"f\.yaml:\d+: model\.options\.hiden: "),
        ({"fixed": {"learning_rate": 0.1}}, r": fixed\.learning_rate: adam .*did you mean 'lr'\?"),
        ({"fixed": {"betas": [3]}}, r"f\.yaml:\d+: fixed\.betas: adam: "),
        ({"fixed": {"train.schedule": "cosin"}}, r": fixed\.train\.schedule: .*'cosine'"),
        ({"fixed": {"task.valfraction": 1}}, r": fixed\.task\.valfraction: .*'val_fraction'"),
        (
            {"objective": {"metric": "val_acuracy", "direction": "maximize"}},
            r"f\.yaml:11: objective\.metric: trials report no 'val_acuracy'; did you mean 'val_ac",
        ),
        ({"constraints": {"val_los": {"max": 1}}}, r"f\.yaml:\d+: constraints\.val_los: trials re"),
    ],
    ids=str,
)
def test_names_that_nothing_knows_have_their_line(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    assert re.search(said, check({**ADAM, **changes}, tmp_path))


def test_every_unknown_metric_is_named(tmp_path: Path) -> None:
    goals = [
        {"metric": "val_acuracy", "direction": "maximize"},
        {"metric": "val_los", "direction": "minimize"},
    ]
    lines = check({**ADAM, "objective": goals}, tmp_path).splitlines()
    assert [line.partition(": trials report no")[0][-19:] for line in lines] == [
        "objective[0].metric",
        "objective[1].metric",
    ]


VALUES = """\
name: values
task: {name: digits}
method: topological_adam
space:
  learning_rate: {type: float, low: 1e-4, high: 1e-2}
  coupling: {type: categorical, choices: [uniform, exchang]}
  mu0: {type: float, low: -1, high: 1}
  beta1: {type: float, low: 0.9, high: 2}
objective: {metric: val_acc, direction: maximize}
constraints:
  overhead_vs_adm: {max: 2}
budget: {trials: 3, epochs: 8}
"""


def places(text: str, tmp_path: Path) -> list[str]:
    found = [re.match(r"error: f\.yaml:(\d+): ([^ ]+): ", x) for x in faults_of(text, tmp_path)]
    return [" ".join(match.groups()) for match in found if match]


def test_values_and_metrics_stand_beside_unknown_names(tmp_path: Path) -> None:
    shared = ["5 space.learning_rate", "6 space.coupling", "7 space.mu0", "8 space.beta1"]
    metrics = ["9 objective.metric", "11 constraints.overhead_vs_adm"]
    assert places(VALUES, tmp_path) == [*shared, *metrics]
    # Also where the file's own rules are broken elsewhere ...
    broken = VALUES.replace("trials: 3", "trials: -3")
    assert places(broken, tmp_path) == [*shared, *metrics, "12 budget.trials"]
    # ... and not where a task that is unknown may have such metrics.
    strange = VALUES.replace("{name: digits}", "no.such:Task")
    assert places(strange, tmp_path) == ["2 task", *shared]
    nameless = VALUES.replace("{name: digits}", "{name: digits, option: {}}")
    assert places(nameless, tmp_path) == ["2 task.option", *shared]


OPTIMIZERS = """\
import torch


class Needy(torch.optim.SGD):
    def __init__(self, params, lr, grip=1):
        if grip < 0:
            raise ValueError("grip must be positive")
        super().__init__(params, lr=lr)


class Failing(torch.optim.SGD):
    def __init__(self, params, lr=0.1, grip=1):
        {0: "off", 1: "on", 2: "more"}[grip]
        super().__init__(params, lr=lr)
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [("Needy", "grip must be positive (got -1)"), ("Failing", "KeyError: -1")],
)
def test_an_optimizer_of_ones_own_has_the_line_of_what_it_refuses(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "refusing.py").write_text(OPTIMIZERS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    space = {**ADAM["space"], "grip": {"type": "int", "low": -1, "high": 2}}
    text = check({**ADAM, "method": f"refusing:{name}", "space": space}, tmp_path)
    assert re.match(r"f\.yaml:\d+: space\.grip: ", text)
    assert said in text


def test_tcep_names_every_parameter_of_the_wrong_name_or_value() -> None:
    config = SearchConfig.model_validate(
        {
            **ADAM,
            "method": "tcep",
            "fixed": {"recirculation": "rign", "gama": 0.1, "optimizer": "adma"},
            "space": {
                "lr": BASE["space"]["lr"],
                "model.widht": {"type": "int", "low": 1, "high": 4},
                "tolerance": {"type": "float", "low": 1e-4, "high": 0.5},
            },
        }
    )
    with pytest.raises(FaultsError) as caught:
        preflight(config)
    assert {fault.place for fault in caught.value.faults} == {
        "fixed.recirculation",
        "fixed.gama",
        "fixed.optimizer",
        "space.model.widht",
        "space.tolerance",
    }


HINTS: list[tuple[tuple[Any, ...], str]] = [
    (("name", 2024), "must be text; put it in quotes (got 2024)"),
    (("task", 2024), "must be text; put it in quotes (got 2024)"),
    (("method", True), "must be text; put it in quotes (got True)"),
    (("description", 1.5), "must be text; put it in quotes (got 1.5)"),
    (("sampler", "bayes"), "unknown sampler 'bayes'; did you mean 'tpe'?"),
    (("space", "lr", [1e-4, 1e-2]), "{type: float, low: 0.0001, high: 0.01}, with log: true"),
    (("space", "depth", [4, 1]), "{type: int, low: 1, high: 4}"),
    (("space", "coupling", ["a", "b"]), "choices are written {type: categorical, choices: [...]}"),
    (("space", "lr", 0.1), "a value that is not searched belongs to fixed"),
    (("space", "lr", "type", "loguniform"), "write type: float with log: true"),
    (("space", "lr", "type", "uniform"), "write type: float"),
    (("space", "coupling", "type", "choice"), "write type: categorical"),
    (("space", "coupling", "choices", [[0.9, 0.99]]), "Give each a name, such as choices: [small"),
    (("space", "coupling", "choices", "uniform"), "must be a list, such as ['uniform']"),
    (("space", "eta", "when", {"lr": 0.001}), "lr is continuous (float 0.0001 to 0.01, log)"),
    (("space", "eta", "when", {"coupling": []}), "an empty list never holds"),
    (("space", "depth", "step", 4), "step 4 exceeds the range (1 to 4), so that only 1 would"),
    (("space", "eta", "step", 3), "step 3.0 exceeds the range (0.01 to 0.5)"),
    (("space", "eta", "step", 1e-300), "step 1e-300 is too small for the range"),
    (("space", "lr", "min", 3), "unknown key 'min'; did you mean 'low'?"),
    (("budget", 20), "must be a block of the keys device_seconds, epochs"),
    (("budget", "n_trials", 20), "unknown key 'n_trials'; did you mean 'trials'?"),
    (("warm_start", {"lr": 1e-3}), "must be a list, such as [{'lr': 0.001}]"),
    (
        ("objective", {"metric": "test_accuracy", "direction": "maximize"}),
        "'test_accuracy' is closed to a search: one that chose by the test split would fit it, and "
        "no data would be left to judge its winner by. Write val_accuracy;",
    ),
    (("constraints", {"test_loss": {"max": 1}}), "Write val_loss;"),
]


@pytest.mark.parametrize(("change", "said"), HINTS, ids=str)
def test_a_message_says_what_to_write(change: tuple[Any, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(changed(*change), tmp_path)
    assert said in str(caught.value)
    assert not isinstance(caught.value, FaultsError)


def test_a_choice_that_needs_quotes_is_said_to(tmp_path: Path) -> None:
    data = changed("space", "coupling", "choices", ["1", "2"])
    data["space"]["eta"]["when"] = {"coupling": 1}
    data["warm_start"] = [{"coupling": 2}]
    with pytest.raises(FaultsError) as caught:
        load(data, tmp_path)
    first, second = caught.value.texts()
    assert first.endswith("coupling never takes the value 1; put it in quotes: '1'")
    assert second.endswith("2 is outside coupling's range (one of 1, 2); put it in quotes: '2'")


def test_a_condition_may_name_null(tmp_path: Path) -> None:
    data = changed("space", "coupling", "choices", ["uniform", None])
    data["space"]["eta"]["when"] = {"coupling": None}
    data["space"]["depth"]["when"] = {"coupling": [None, "uniform"]}
    config = load(data, tmp_path)
    assert sorted(corners(config)[0].params) == ["coupling", "depth", "lr"]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = [suggest(study.ask(), config.space) for _ in range(20)]
    assert {("eta" in point, point["coupling"]) for point in seen} == {
        (True, None),
        (False, "uniform"),
    }
    assert all("depth" in point for point in seen)
    found = CliRunner().invoke(app, ["check", "--quick", str(tmp_path / "space.yaml")])
    assert "one of uniform, null" in found.output
    assert "coupling is null or uniform" in found.output


@pytest.mark.parametrize(
    ("low", "high", "step"),
    [(0.0, 1.0, 0.3), (0.1, 0.3, 0.1), (0.0, 1.0, 0.1), (-1.0, 2.5, 0.7), (1, 10, 4), (0, 9, 3)],
)
def test_a_step_that_does_not_divide_is_cut_as_optuna_cuts_it_and_said(
    low: float, high: float, step: float, tmp_path: Path
) -> None:
    kind = "int" if isinstance(low, int) else "float"
    data = changed("space", "depth", {"type": kind, "low": low, "high": high, "step": step})
    config = load(data, tmp_path)
    param = config.space["depth"]
    assert isinstance(param, FloatParam | IntParam)
    study = optuna.create_study()
    ours, theirs = study.ask(), study.ask()
    suggest(ours, {"depth": param})  # a warning of Optuna would be an error here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(param, IntParam):
            theirs.suggest_int("depth", param.low, param.high, step=param.step)
        else:
            theirs.suggest_float("depth", param.low, param.high, step=param.step)
    assert ours.distributions == theirs.distributions
    last = theirs.distributions["depth"].to_external_repr(last_value(param))
    assert theirs.distributions["depth"].high == last  # type: ignore[attr-defined]
    assert len([*unreached_ends(config)]) == (last != high)
    found = CliRunner().invoke(app, ["check", "--quick", str(tmp_path / "space.yaml")])
    assert ("note: space.depth: steps of" in found.output) == (last != high)


def test_a_search_that_exists_goes_on_under_the_rules_it_began_with() -> None:
    data = changed("space", "eta", "when", {"lr": 0.001})
    data["space"]["depth"]["step"] = 9
    with pytest.raises(FaultsError):
        parse_search(data, "search.json", {})
    assert parse_search(data, "search.json", {}, saved=True).space["depth"].low == 1  # type: ignore[union-attr]


def test_very_many_faults_are_counted(tmp_path: Path) -> None:
    data = {**BASE, "fixed": {f"x y{index}": 1 for index in range(50)}}
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(FaultsError) as caught:
        load_search(tmp_path / "f.yaml")
    assert len(caught.value.faults) == 50
    assert caught.value.texts()[-1] == "30 more faults; the first 20 are shown"
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    field = pickle.loads(pickle.dumps(FieldError(("space", "lr"), "a", "b")))
    assert (field.path, str(field)) == (("space", "lr"), "space.lr: a. b")
