"""The optimizer contract: torch's optimizers keep it, broken ones do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from topotune.testing import OptimizerContract


class TestAdam(OptimizerContract):
    optimizer = Adam


class TestMomentumSgd(OptimizerContract):
    optimizer = SGD
    options: ClassVar[dict[str, float]] = {"lr": 0.05, "momentum": 0.9}


class Frozen(SGD):
    def step(self, closure: Any = None) -> Any:
        return closure() if closure else None


class Ascending(SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, maximize=True)


class Noisy(SGD):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    noise = torch.randn(p.shape, generator=_entropy)
                    p.add_(noise, alpha=1e-4)
        return loss


_entropy = torch.Generator()
_entropy.seed()


class Forgetful(SGD):
    """Counts its steps on itself, not in its state."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            group["lr"] = 0.05 / self.steps
        return super().step(closure)


class Replacing(SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - group["lr"] * p.grad
        return None


class KeepsGradients(SGD):
    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


class OneRate(SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]
        return super().step(closure)


class FirstGroupOnly(SGD):
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-self.defaults["lr"])
        return None


class DecaysAlways(SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(0.99)
        return super().step(closure)


class DropsTheLoss(SGD):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)


class IgnoresTheClosure(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step()


@pytest.mark.parametrize(
    ("broken", "check", "words"),
    [
        (Frozen, "reduces_a_quadratic", "not below 0.1 of it"),
        (Ascending, "reduces_a_quadratic", "not below 0.1 of it"),
        (Noisy, "repeats_itself", "two runs with the same seed differ"),
        (Forgetful, "resumes_bit_for_bit", "resumed from state_dict"),
        (Replacing, "updates_in_place", "replaced"),
        (KeepsGradients, "zero_grad", "leaves 3 gradients"),
        (OneRate, "groups_have_their_own_learning_rate", "its lr is ignored"),
        (FirstGroupOnly, "groups_can_be_added", "added later does not move"),
        (DecaysAlways, "parameters_without_gradient_stay", "was moved"),
        (DropsTheLoss, "closure", "returns nothing"),
        (IgnoresTheClosure, "closure", "does not call"),
    ],
)
def test_the_contract_finds(broken: Callable[..., Optimizer], check: str, words: str) -> None:
    contract = OptimizerContract()
    contract.make_optimizer = lambda params: broken(params, lr=0.05)  # type: ignore[method-assign]
    with pytest.raises(AssertionError) as caught:
        getattr(contract, f"test_{check}")()
    assert words in str(caught.value)


def test_a_hidden_random_start_is_found() -> None:
    class RandomPull(SGD):
        """Draws a direction when it is built and does not save it."""

        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr=lr)
            self.pull: Tensor = torch.randn(())

        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(self.pull, alpha=1e-3)
            return super().step(closure)

    contract = OptimizerContract()
    contract.make_optimizer = lambda params: RandomPull(params, lr=0.05)  # type: ignore[method-assign]
    contract.test_repeats_itself()
    with pytest.raises(AssertionError, match="resumed from state_dict"):
        contract.test_resumes_bit_for_bit()
