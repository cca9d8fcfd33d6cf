"""The process that a trial runs in: its device, its global state and random generators, and what it
is made of."""

from __future__ import annotations

import gc
import importlib
import platform
import random
import socket
from typing import Any, TypeAlias

import numpy as np
import torch

from topotune import __version__
from topotune.errors import ConfigError, ResourceError
from topotune.repository import own_tags
from topotune.seeding import seed_everything

GeneratorStates: TypeAlias = dict[str, Any]
"""Plain numbers and byte tensors only, so that ``torch.load(weights_only=True)`` reads them."""
_OWN_THREADS = torch.get_num_threads()
_HOOKS: list[dict[Any, Any]] = [
    value
    for module in map(importlib.import_module, ("torch.nn.modules.module", "torch.optim.optimizer"))
    for name, value in vars(module).items()
    if name.startswith("_global_") and isinstance(value, dict)
]
"""Where torch keeps hooks of all modules and all optimizers."""
_OWN_HOOKS = [dict(hooks) for hooks in _HOOKS]


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resolve_device(name: str) -> torch.device:
    """The torch device of a spec's ``device``.

    Args:
        name: "auto" (the first GPU if torch sees one, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: the name has another form.
        ResourceError: a GPU is asked for that torch does not see.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (name == "cuda" or number.isdecimal()):
        raise ConfigError(
            "device", f"unknown device {name!r}", "Use 'auto', 'cpu', 'cuda' or 'cuda:N'"
        )
    index = int(number or 0)
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= seen:
        raise ResourceError(
            f"device {name!r}: torch sees {seen} GPU(s) in this process, numbered from 0. "
            "Use 'auto' or 'cpu', or install a driver and a torch build that see the GPU"
        )
    return torch.device("cuda", index)


def reset_process_state(seed: int, threads: int, device: torch.device) -> None:
    """Make a process that has run other trials equal to a fresh one, as far as results go.

    Seeds every global generator, and sets back what a model, task or optimizer may have changed:
    default dtype and device, gradient and anomaly mode, deterministic and precision switches,
    hooks on all modules or optimizers, NumPy's error state, thread count; frees a GPU's memory
    and resets its peak counters.

    Args:
        seed: seed of the global generators.
        threads: CPU threads of torch; 0 for torch's own choice at start-up.
        device: the trial's device.
    """
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.autograd.set_detect_anomaly(False)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(False)
    torch.backends.mkldnn.set_flags(True)  # type: ignore[no-untyped-call]
    for hooks, own in zip(_HOOKS, _OWN_HOOKS, strict=True):
        hooks.clear()
        hooks.update(own)
    # Benchmarking picks convolution kernels by timing, which differs from run to run.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.set_num_threads(threads or _OWN_THREADS)
    np.seterr(divide="warn", over="warn", under="ignore", invalid="warn")
    if device.type == "cuda":
        # Cycles of earlier trials hold device memory until collected. On the CPU the automatic
        # collector is enough, and a full collection costs most of a second with torch loaded.
        gc.collect()
        torch.cuda.set_device(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seed_everything(seed)


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


def provenance(device: torch.device) -> dict[str, str]:
    """Versions, kernels, device and host, as tags of a trial.

    ``device_count`` is of the GPUs that the process sees: under Ray those that the trial holds,
    one where it shares one. ``device_memory`` is all that one of them has.
    """
    return {
        "version.topotune": __version__,
        **own_tags(),
        "version.torch": str(torch.__version__),
        "version.python": platform.python_version(),
        "version.numpy": str(np.__version__),
        "device": str(device),
        **_device(device),
        "kernels": _kernels(device),
        "host": socket.gethostname(),
    }


def _kernels(device: torch.device) -> str:
    """Which of its kernels torch takes: they sum in another order each."""
    if device.type == "cuda":
        cudnn: int = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        return f"CUDA {torch.version.cuda}, cuDNN {cudnn}"
    return torch.backends.cpu.get_cpu_capability()


def _device(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"device_name": platform.processor() or platform.machine(), "device_count": "0"}
    memory = torch.cuda.get_device_properties(device).total_memory
    return {
        "device_name": torch.cuda.get_device_name(device),
        "device_count": str(torch.cuda.device_count()),
        "device_memory": f"{memory / 2**30:.1f} GiB",
    }
