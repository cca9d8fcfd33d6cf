"""The state of every global random generator: taken, and put back."""

from __future__ import annotations

import random
from typing import Any, TypeAlias

import numpy as np
import torch

GeneratorStates: TypeAlias = dict[str, Any]
"""Plain numbers and byte tensors only, so that ``torch.load(weights_only=True)`` reads them."""


def capture_generators(device: torch.device) -> GeneratorStates:
    """The states of Python's, NumPy's and torch's global generators.

    Args:
        device: the trial's device; its generator is included when it is a GPU.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    assert kind == "MT19937"  # NumPy's global generator has no other kind
    states: GeneratorStates = {
        "python": (version, torch.tensor(internal), gauss_next),
        "numpy": (
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: GeneratorStates, device: torch.device) -> None:
    """Put back what :func:`capture_generators` took.

    States without a GPU's leave a GPU's generator as it is.
    """
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))
    keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
