"""The contract of an optimizer."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from topotune.testing.check import check


class OptimizerContract:
    """What topotune expects of a ``torch.optim.Optimizer``.

    Inherit it in a class whose name starts with ``Test`` and set :attr:`optimizer`, or override
    :meth:`make_optimizer`. The checks run on a convex quadratic whose minimum is known.

    Attributes:
        optimizer: the class to check, constructed with the parameters and :attr:`options`.
        options: keyword arguments of its constructor.
        steps: steps after which the quadratic must have come down.
        remaining: share of the initial loss that may be left by then.
    """

    optimizer: ClassVar[Callable[..., Optimizer]]
    options: ClassVar[Mapping[str, Any]] = {"lr": 0.05}
    steps: ClassVar[int] = 200
    remaining: ClassVar[float] = 0.1

    def make_optimizer(self, params: Iterable[Any]) -> Optimizer:
        """A new optimizer over parameters or parameter groups."""
        return type(self).optimizer(params, **self.options)

    def test_reduces_a_quadratic(self) -> None:
        """It optimizes."""
        params = _start()
        before = _loss(params).item()
        _run(self.make_optimizer(params), params, self.steps)
        after = _loss(params).item()
        check(
            after <= self.remaining * before,
            f"{self.steps} steps take the loss from {before:g} to {after:g}, "
            f"not below {self.remaining:g} of it",
        )

    def test_repeats_itself(self) -> None:
        """Equal seeds give equal bits."""
        first, second = (self._trained(steps=10) for _ in range(2))
        check(_equal(first, second), "two runs with the same seed differ")

    def test_resumes_bit_for_bit(self) -> None:
        """All that it remembers is in its state_dict, in types that a safe load accepts."""
        expected = self._trained(steps=20)
        torch.manual_seed(0)
        params = _start()
        optimizer = self.make_optimizer(params)
        _run(optimizer, params, 10)
        file = io.BytesIO()
        torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        torch.manual_seed(1)
        resumed = [p.detach().clone().requires_grad_() for p in saved["params"]]
        fresh = self.make_optimizer(resumed)
        fresh.load_state_dict(saved["optimizer"])
        _run(fresh, resumed, 10)
        check(_equal(expected, resumed), "a run resumed from state_dict differs from a whole one")

    def test_updates_in_place(self) -> None:
        """Parameters keep their memory, shape and dtype: the model holds the same tensors."""
        params = _start()
        kept = [(p.data_ptr(), p.shape, p.dtype) for p in params]
        _run(self.make_optimizer(params), params, 2)
        check(
            kept == [(p.data_ptr(), p.shape, p.dtype) for p in params], "a parameter was replaced"
        )

    def test_zero_grad(self) -> None:
        """``zero_grad`` clears every gradient."""
        params = _start()
        optimizer = self.make_optimizer(params)
        _loss(params).backward()  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        left = [p.grad for p in params if p.grad is not None and bool(p.grad.any())]
        check(not left, f"zero_grad() leaves {len(left)} gradients")

    def test_groups_have_their_own_learning_rate(self) -> None:
        """A group's ``lr`` moves its parameters only, and schedulers may change it."""
        fast, slow = _start(), _start()
        torch.manual_seed(0)
        optimizer = self.make_optimizer([{"params": fast}, {"params": slow}])
        if "lr" not in optimizer.param_groups[1]:
            return
        optimizer.param_groups[1]["lr"] *= 0.01
        _run(optimizer, fast + slow, 3)
        far, near = (_distance(params, _start()) for params in (fast, slow))
        check(far > 0, "the first parameter group does not move")
        check(
            near < 0.5 * far,
            f"at a hundredth of the learning rate the second group moves {near:g}, the first "
            f"{far:g}: its lr is ignored",
        )

    def test_groups_can_be_added(self) -> None:
        """A group that is added during training is trained."""
        early, late = _start(), _start()
        optimizer = self.make_optimizer(early)
        _run(optimizer, early, 2)
        optimizer.add_param_group({"params": late})
        _run(optimizer, early + late, 2)
        check(_distance(late, _start()) > 0, "a group that was added later does not move")

    def test_parameters_without_gradient_stay(self) -> None:
        """No gradient, no step."""
        params = _start()
        optimizer = self.make_optimizer(params)
        _loss(params[:1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        check(_distance(params[1:], _start()[1:]) == 0, "a parameter without gradient was moved")

    def test_closure(self) -> None:
        """``step(closure)`` evaluates the closure with gradients enabled and returns its loss."""
        params = _start()
        optimizer = self.make_optimizer(params)
        losses: list[Tensor] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses.append(_loss(params))
            losses[-1].backward()  # type: ignore[no-untyped-call]
            return losses[-1]

        returned = optimizer.step(closure)  # type: ignore[arg-type]
        check(bool(losses), "step(closure) does not call the closure")
        check(returned is not None, "step(closure) returns nothing")
        same = torch.equal(torch.as_tensor(returned).detach(), losses[0].detach())
        check(same, f"step(closure) returns {returned!r}, the loss was {losses[0].item()!r}")
        check(_distance(params, _start()) > 0, "step(closure) does not move the parameters")

    def _trained(self, steps: int) -> list[Tensor]:
        torch.manual_seed(0)
        params = _start()
        _run(self.make_optimizer(params), params, steps)
        return params


def _start() -> list[Tensor]:
    """A matrix, a vector and a scalar, away from the minimum at zero."""
    return [
        torch.linspace(0.5, 1.5, 12).reshape(3, 4).requires_grad_(),
        torch.linspace(-1.5, -0.5, 5).requires_grad_(),
        torch.tensor(1.0, requires_grad=True),
    ]


def _loss(params: list[Tensor]) -> Tensor:
    """Half of a sum of squares with curvatures from 1 to 4; zero at zero."""
    return torch.stack(
        [
            (torch.linspace(1.0, 4.0, p.numel()).reshape(p.shape) * p.square()).sum() / 2
            for p in params
        ]
    ).sum()


def _run(optimizer: Optimizer, params: list[Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(params).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    return sum((p - q).detach().abs().sum().item() for p, q in zip(one, other, strict=True))
