"""What the page about TCEP shows is true: its code runs, its tables are those of the code."""

from __future__ import annotations

import inspect
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from topotune.bench.tcep.accuracy import EPOCHS
from topotune.bench.tcep.run import PARTS
from topotune.cli.main import app
from topotune.config.file import parse_search, parse_yaml
from topotune.config.models import SearchConfig
from topotune.optim import optimizer_class
from topotune.records import OverheadOptions, TrialSpec, Value
from topotune.search.doctor.preflight import preflight
from topotune.tcep.network import FIELDS, TCEPNetwork
from topotune.tcep.options import GRADIENTS, NAMES, RECIRCULATIONS, SOLVERS, read_options
from topotune.testing import EnergyContract
from topotune.train.rehearsal import metric_names
from topotune.train.tcep import OPTIMIZER, PATIENCE, TOLERATED, TcepMethod

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "topotune" / "tcep" / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))

torch.set_num_threads(1)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table, without its heading; code marks off."""
    found = [line for line in SECTIONS[section].splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in found[2:]]
    return [[cell.strip() for cell in row] for row in cells]


def first_column(section: str) -> list[str]:
    return [row[0].strip("`") for row in rows(section)]


def value(cell: str) -> Value:
    """What a cell of the table says that a parameter is."""
    if cell == "unset":
        return None
    text = cell.removeprefix("`").removesuffix("`")
    try:
        found: Value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return found


DEFAULTS = {row[0].strip("`"): value(row[1]) for row in rows("Parameters")}


def spec(method: str = "tcep", blocks: int = 0, **params: Value) -> TrialSpec:
    return TrialSpec(
        task="digits_rolled",
        method=method,
        epochs=1,
        seed=0,
        params=params,
        model_options={"width": 8, "hidden": 8} if method == "tcep" else {},
        overhead=OverheadOptions(blocks=blocks, steps=1, warmup=0),
    )


# Tables.


def test_the_table_lists_every_parameter_once() -> None:
    assert sorted(first_column("Parameters")) == sorted([*NAMES, OPTIMIZER])


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_defaults_are_the_true_ones(name: str) -> None:
    if name == "field":
        assert inspect.signature(TCEPNetwork).parameters[name].default == DEFAULTS[name]
        assert DEFAULTS[name] in FIELDS
    else:
        assert read_options({name: DEFAULTS[name]}) == read_options({})


def test_the_default_optimizer_is_the_true_one() -> None:
    built = TcepMethod(spec(lr=0.1)).optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert type(built) is optimizer_class(str(DEFAULTS[OPTIMIZER]))


def test_another_value_is_not_the_default() -> None:
    """Guards the comparison above: an option that is not read would pass it with any value."""
    for name, other in {"lambda": 2.0, "beta": 0.2, "step": 0.5, "cap_hidden": 5.0}.items():
        assert read_options({name: other}) != read_options({})


@pytest.mark.parametrize(
    ("section", "known"),
    [("Recirculation", RECIRCULATIONS), ("Solvers", SOLVERS), ("Gradients", GRADIENTS)],
)
def test_tables_of_choices_are_complete(section: str, known: tuple[str, ...]) -> None:
    assert sorted(first_column(section)) == sorted(known)


def test_limits_are_the_codes() -> None:
    assert TOLERATED == 0.05
    assert f"more than {TOLERATED * 100:.0f} % of the samples unconverged" in PAGE
    assert PATIENCE == 3
    assert "in each of three epochs in a row" in PAGE


def test_what_is_reported_is_on_the_page() -> None:
    reported = set(metric_names(spec(gamma=0.1, probe_cosine=True)))
    own = reported - set(metric_names(spec("adam", lr=0.1)))
    section = SECTIONS["What is reported"]
    assert "nudge_resolution" in own
    assert not [name for name in sorted(own) if f"`{name}`" not in section]
    claimed = set(re.findall(r"`([a-z_]+)`", section)) - set(GRADIENTS)
    assert claimed - own == {"beta", "overhead_vs_bptt"}  # if learned; if measured


@pytest.mark.parametrize(
    "part",
    [
        "sequences",
        "climate",
        "physical simulations",
        "sequential MNIST",
        "reinforcement learning",
        "varies in time",
        "learned by a meta-dynamics",
        "spiking",
        "adversaries",
        "variable depth",
        "TorEqProp",
        "2 to 4 times fewer iterations",
        "CIFAR-10",
        "R(h)",
        "adjoint",
        "integral over infinite time",
        "first period",
    ],
)
def test_departures_name_what_is_not_built(part: str) -> None:
    assert part in SECTIONS["Where it departs from the proposal"]


# Code.


def test_the_network_alone_learns_by_nearly_exact_gradients(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[0]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert float(found["loss"]) < 0.5 * math.log(2)
    assert float(found["cosine"]) > 0.999


def test_the_field_keeps_its_contract(tmp_path: Path) -> None:
    for name, text in zip(("my_field.py", "test_my_field.py"), blocks("python")[1:], strict=True):
        assert f"`{name}`" in PAGE
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_field.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    checks = [name for name in dir(EnergyContract) if name.startswith("test_")]
    assert done.returncode == 0, done.stdout
    assert f"{len(checks)} passed" in done.stdout


def test_the_field_can_be_searched_and_has_the_mu_that_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_field.py").write_text(blocks("python")[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert "val_accuracy" in preflight(_search())
        model = TCEPNetwork(1, 8, width=4, memory=6, field="my_field:Recall")
        with torch.no_grad():
            for weight, _, _ in model.field.capped():
                weight.mul_(50.0)
            for _ in range(50):
                model.caps()
            drive = model.drive(torch.randn(64, 1, 8, 8))
            mu = model.one_sided_lipschitz(drive, 3.0 * torch.randn(64, model.field.size))
        assert 0.0 < float(mu.max()) <= 0.5 + 1e-4
    finally:
        sys.modules.pop("my_field", None)


def _search() -> SearchConfig:
    (text,) = blocks("yaml")
    data, lines = parse_yaml(text.encode(), "README.md")
    return parse_search(data, "README.md", lines)


# Commands and files.


def commands() -> list[list[str]]:
    lines = [line.partition("#")[0] for text in blocks("console") for line in text.splitlines()]
    lines += re.findall(r"`(topotune [^`]*)`", PAGE)
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_and_option_exists(arguments: list[str]) -> None:
    depth = 2 if arguments[0] == "bench" else 1
    shown = CliRunner().invoke(app, [*arguments[:depth], "--help"])
    assert shown.exit_code == 0, shown.output
    known = {"--part": PARTS, "--task": tuple(EPOCHS)}
    for option, given in zip(arguments[depth::2], arguments[depth + 1 :: 2], strict=False):
        assert option in shown.output
        assert given in known[option]


def test_every_part_of_the_benchmark_has_its_command() -> None:
    parts = {arguments[3] for arguments in commands() if arguments[:2] == ["bench", "tcep"]}
    assert parts == set(PARTS)
    assert PAGE.count("<!-- figures -->") <= 1


@pytest.mark.parametrize("name", re.findall(r"`(search_spaces/[^`]+)`", PAGE))
def test_files_that_the_page_names_exist(name: str) -> None:
    assert (ROOT / name).is_file()
