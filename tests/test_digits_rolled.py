"""The rolled digits: fixed rolls, the same images for everybody, and harder than plain ones."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from topotune.cli.main import app
from topotune.data import SplitPlan, TensorPair, load_splits
from topotune.data.packaged import digit_rolls, load_digits, load_rolled_digits
from topotune.tasks import DataOptions, build_task
from topotune.tasks.images import DigitsRolled
from topotune.testing import TaskContract


class TestDigitsRolled(TaskContract):
    task = DigitsRolled


def test_rolls_are_uniform() -> None:
    rolls = digit_rolls(1797)
    assert rolls.dtype == torch.int64
    counts = torch.bincount(rolls, minlength=8).double()
    assert len(counts) == 8
    # Chi squared of 7 degrees of freedom; 24.3 is its upper thousandth.
    expected = 1797 / 8
    assert ((counts - expected) ** 2 / expected).sum().item() < 24.3


def test_rolls_say_nothing_of_the_class_or_of_their_neighbour() -> None:
    rolls, labels = digit_rolls(1797), load_digits().targets
    for other in (labels, rolls.roll(1)):
        table = torch.zeros(8, int(other.max()) + 1, dtype=torch.float64)
        table.index_put_((rolls, other), torch.ones(1, dtype=torch.float64), accumulate=True)
        expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
        degrees = (table.shape[0] - 1) * (table.shape[1] - 1)
        chi = ((table - expected) ** 2 / expected).sum().item()
        assert chi < degrees + 4 * (2 * degrees) ** 0.5


def test_a_roll_belongs_to_its_row() -> None:
    assert torch.equal(digit_rolls(1797)[:10], digit_rolls(10))


def test_rolling_back_gives_the_digits() -> None:
    plain, rolled = load_digits(), load_rolled_digits()
    assert rolled.inputs.dtype == torch.uint8
    assert rolled.inputs.shape == (1797, 1, 8, 8)
    assert torch.equal(rolled.targets, plain.targets)
    for image, roll, original in zip(
        rolled.inputs, digit_rolls(1797).tolist(), plain.inputs, strict=True
    ):
        assert torch.equal(torch.roll(image, -roll, dims=1), original)
    moved = (rolled.inputs != plain.inputs).flatten(1).any(dim=1)
    assert torch.equal(moved, digit_rolls(1797) > 0)


def test_the_images_are_pinned() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    rows = load_rolled_digits()
    assert torch.equal(torch.get_rng_state(), before)
    digest = hashlib.sha256(rows.inputs.numpy().tobytes() + rows.targets.numpy().tobytes())
    assert digest.hexdigest() == "a0efc2d262cdb2e33a0717b2ba10f14ae936feb9c78e9b2213cdedc50e6f389d"


@pytest.mark.parametrize("seed", [0, 5])
def test_a_split_holds_the_same_rows_as_of_plain_digits(seed: int) -> None:
    plain = load_splits("digits", SplitPlan(seed=seed), None, False)
    rolled = load_splits("digits_rolled", SplitPlan(seed=seed), None, False)
    known = {image.numpy().tobytes() for image in load_rolled_digits().inputs}
    for name in ("train", "val", "test"):
        one, other = getattr(plain, name), getattr(rolled, name)
        assert torch.equal(one.targets, other.targets)
        assert all(image.numpy().tobytes() in known for image in other.inputs)
        assert all(map(_same_up_to_a_roll, one.inputs, other.inputs))


def _same_up_to_a_roll(one: Tensor, other: Tensor) -> bool:
    return any(torch.equal(torch.roll(one, k, dims=1), other) for k in range(8))


def test_a_linear_model_tells_plain_digits_and_not_rolled_ones() -> None:
    def accuracy(name: str) -> float:
        torch.manual_seed(0)
        task = build_task(name, {})
        splits = task.splits(DataOptions())

        def rows(pair: TensorPair) -> Tensor:
            return task.prepare(pair.inputs).flatten(1)

        model = torch.nn.Linear(64, 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            task.loss(model(rows(splits.train)), splits.train.targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        outputs = model(rows(splits.val))
        return task.metrics(outputs, splits.val.targets)["accuracy"].item()

    assert accuracy("digits") > 0.93
    assert accuracy("digits_rolled") < 0.70


def test_it_is_listed() -> None:
    listed = CliRunner().invoke(app, ["tasks"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0
    assert "digits_rolled" in listed.output
