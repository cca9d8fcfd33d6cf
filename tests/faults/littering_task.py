"""Trials that leave their process changed in every way that a later trial could notice."""

from __future__ import annotations

import builtins
import decimal
import gc
import locale
import logging
import os
import random
import signal
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.faults.task import PacedRings


class Littering(PacedRings):
    """Changes global state in its second batch and never sets it back.

    Args:
        kind: which state: "torch", "python", "process" or "model".
    """

    def __init__(self, kind: str = "torch") -> None:
        super().__init__()
        self._kind, self._batches = kind, 0

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        self._batches += 1
        if self._batches == 2 and sys.argv[0].endswith("default_worker.py"):
            getattr(self, f"_{self._kind}")()
        return inputs

    def _torch(self) -> None:
        torch.set_num_threads(2)
        torch.manual_seed(99)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.autograd.set_detect_anomaly(True)
        torch.set_float32_matmul_precision("medium")
        torch.set_flush_denormal(True)
        torch.set_default_dtype(torch.float64)

    def _python(self) -> None:
        random.seed(99)
        np.random.seed(99)
        np.seterr(all="ignore")
        warnings.simplefilter("error")
        logging.disable(logging.CRITICAL)
        decimal.getcontext().prec = 3
        gc.disable()
        sys.setrecursionlimit(5000)
        sys.path.insert(0, "/nowhere")
        builtins.littered = True  # type: ignore[attr-defined]

    def _process(self) -> None:
        os.environ["TOPOTUNE_LITTER"] = "1"
        os.environ["OMP_NUM_THREADS"] = "7"
        os.environ.pop("PATH", None)
        os.umask(0o077)
        os.chdir(tempfile.gettempdir())
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        locale.setlocale(locale.LC_ALL, "C")

    def _model(self) -> None:
        def hook(*_: Any) -> None:
            raise RuntimeError("a hook of an earlier trial")

        torch.nn.modules.module.register_module_forward_pre_hook(hook)
        torch.set_grad_enabled(False)
        torch.set_default_device("meta")


class Marked(PacedRings):
    """Learns what its process looks like: its inputs have noise that depends on global state."""

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        state = (
            os.environ.get("TOPOTUNE_LITTER", ""),
            os.environ.get("OMP_NUM_THREADS", ""),
            "PATH" in os.environ,
            str(Path.cwd()),
            np.geterr()["over"],
            gc.isenabled(),
            torch.get_num_threads(),
            str(torch.get_default_dtype()),
            torch.are_deterministic_algorithms_enabled(),
            bool(torch.backends.cuda.matmul.allow_tf32),
            bool(torch.backends.mkldnn.enabled),
            decimal.getcontext().prec,
            logging.root.manager.disable,
            random.random(),
            float(np.random.rand()),
            [str(rule) for rule in warnings.filters],
            _umask(),
            "/nowhere" in sys.path,
        )
        noise = torch.Generator().manual_seed(zlib.crc32(repr(state).encode()))
        return inputs + 0.01 * torch.randn(inputs.shape, generator=noise)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
