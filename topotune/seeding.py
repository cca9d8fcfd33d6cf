"""One seed per (search, trial, replica), and one call that sets every generator."""

from __future__ import annotations

import hashlib
import random


def derive_seed(search_seed: int, trial: int, replica: int = 0) -> int:
    """A 63-bit seed that depends on all three numbers and on nothing else.

    A hash, not a sum: neighbouring trials get unrelated streams, and (seed 1, trial 0) never
    equals (seed 0, trial 1).
    """
    text = f"topotune:{search_seed}:{trial}:{replica}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's (all devices') global generators."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
