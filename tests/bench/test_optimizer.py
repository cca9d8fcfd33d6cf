"""The benchmark measures what it says; how fast anything is, is not tested."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from typer.testing import CliRunner

from topotune.bench import optimizer as bench
from topotune.bench.shared import ratio
from topotune.cli.main import app
from topotune.errors import ConfigError, UnknownNameError


def test_one_record_a_contender_and_the_baselines_are_one() -> None:
    threads = torch.get_num_threads()
    records = bench.run(["mlp"], rounds=3, steps=1)
    assert [record.contender for record in records] == list(bench.CONTENDERS)
    by_name = {record.contender: record for record in records}
    assert by_name[bench.BASELINE].vs_adam == 1.0
    assert by_name[bench.BASELINE].vs_adam_spread == 0.0
    assert by_name[bench.FUSED].vs_fused == 1.0
    assert all(record.parameters == 784 * 256 + 256 + 256 * 10 + 10 for record in records)
    assert all(record.step_ms > 0.0 for record in records)
    assert torch.get_num_threads() == threads


def test_every_contender_trains() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, bench.CLASSES)
    inputs = torch.randn(bench.BATCHES, bench.BATCH, 4)
    targets = torch.randint(bench.CLASSES, (bench.BATCHES, bench.BATCH))
    for name, build in bench.CONTENDERS.items():
        runner = bench._Runner(model, build, inputs, targets, 5)
        runner()
        weight = next(runner._model.parameters())
        assert not torch.equal(weight, model.weight), name
        assert runner._taken == 5


def test_ratios_are_formed_within_a_round() -> None:
    """A round in which the machine was ten times as slow does not move the median."""
    mine, theirs = [2.0, 20.0, 2.2, 1.8], [1.0, 10.0, 1.0, 1.0]
    middle, spread = ratio(mine, theirs)
    assert middle == 2.0
    low, _, high = statistics.quantiles([2.0, 2.0, 2.2, 1.8], n=4, method="inclusive")
    assert spread == pytest.approx(high - low)


def test_the_command_prints_json_and_a_table() -> None:
    command = ["bench", "optimizer", "--model", "mlp", "--rounds", "2", "--steps", "1"]
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert {record["model"] for record in json.loads(done.stdout)} == {"mlp"}
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "literal recursion" in done.stdout


def test_bad_input_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'mlp'"):
        bench.run(["mpl"])
    with pytest.raises(ConfigError, match=r"rounds: must be >= 2 \(got 1\)"):
        bench.run(["mlp"], rounds=1)
