"""Full precision inside of relaxations, whatever the caller has switched on around them.

A nudge moves a state by something like beta, and the gradient is what that moves, over beta. In 8
or 11 bits the difference drowns in rounding: measured on a small network, the gradient's cosine
with the exact one is .2 to .4 under bfloat16 autocast, and no residual says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from topotune.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

DEVICES = ("cpu", "cuda")

SWITCHES = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
)
"""What float32 products may be rounded to within, of each library and kind of product."""


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose float32 products are rounded to float32 and no further.

    Inside, autocast is off, backward passes included (they would be cast as well), and so are
    TF32 and bfloat16 within matrix products and convolutions. cuDNN's convolutions use TF32 by
    default. Settings are the process's, so that other threads see them for as long.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with _autocast_off(), _products_exact():
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def _autocast_off() -> Iterator[None]:
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def _products_exact() -> Iterator[None]:
    before = [switch.fp32_precision for switch in SWITCHES]
    for switch in SWITCHES:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, value in zip(SWITCHES, before, strict=True):
            switch.fp32_precision = value


def check_precision(model: nn.Module) -> None:
    """Refuse parameters of less than 32 bits.

    Raises:
        ConfigError: names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and torch.finfo(parameter.dtype).bits < 32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ConfigError(
                f"parameter {name}",
                f"must be float32 or float64 in a network that relaxes (got {kind}): the nudge "
                "drowns in rounding, and gradients point anywhere",
                "Keep the model in float32; autocast around it is switched off inside",
            )
