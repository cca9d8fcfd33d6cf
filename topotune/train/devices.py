"""The GPUs of a trial's process: how much of their memory it may take, and what it took when there
was none left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch

from topotune.errors import ResourceError
from topotune.train.measures import peak_memory_mb
from topotune.train.process import resolve_device

_FULL = re.compile(r"CUDA error: out of memory|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says, in a plain RuntimeError, where not its own allocator but CUDA ran out."""
_WANTED = re.compile(r"[Tt]ried to allocate ([0-9.]+ [KMG]iB)")
_GIB = 2.0**30
_HARDWARE = (Path("/dev/nvidia0"), Path("/dev/kfd"))
"""What a machine has whose NVIDIA or AMD driver works; containers without GPUs lack them."""


def memory_share(gpus: float, wanted: float | Literal["auto"], alone: bool) -> float:
    """The part of each GPU's memory that a trial's process may take, above 0 and at most 1.

    Args:
        gpus: GPUs that the trial holds; a fraction shares one.
        wanted: ``resources.gpu_memory``; "auto" for as much as the trial holds of a GPU.
        alone: it is tried again alone on a device, after it ran out of memory: no cap.
    """
    if alone:
        return 1.0
    if wanted != "auto":
        return wanted
    return gpus if 0 < gpus < 1 else 1.0


def cap_memory(share: float) -> None:
    """Let torch take at most this part of the memory of each GPU that this process sees; a trial
    that asks for more gets a ``torch.OutOfMemoryError``. A later call replaces it; 1 lifts it."""
    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_per_process_memory_fraction(float(share), index)


def check_gpus(gpus: float) -> None:
    """Refuse to train on the CPU, at a fraction of the speed, while a GPU is held and idle.

    A GPU that Ray advertises but the machine lacks does not count: such trials train on the CPU.

    Raises:
        ResourceError: the machine has a GPU, and torch sees none in this process.
    """
    if gpus > 0 and not torch.cuda.is_available() and any(path.exists() for path in _HARDWARE):
        raise ResourceError(
            f"a trial holds {gpus:g} GPU(s) and this machine has some, but torch "
            f"{torch.__version__} sees none. Install a torch build and a driver that fit, or write "
            "gpus: 0 to train on the CPUs"
        )


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from, says that a GPU's memory is full.

    What a CPU's allocator says is something else: the machine's memory is not shared out.
    """
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, torch.OutOfMemoryError):
            return True
        if isinstance(cause, RuntimeError) and _FULL.search(_text(cause)):
            return True
        cause = cause.__cause__
    return False


def memory_in_words(error: BaseException, share: float) -> str:
    """What this process had of its device's memory when it ran out, on a line.

    Args:
        error: what was raised, which may say how much it asked for.
        share: the part of the device's memory that it might take.
    """
    device = resolve_device("auto")
    peak = peak_memory_mb(device) * 2**20 / _GIB
    asked = _WANTED.search(_text(error))
    more = f" when it asked for {asked[1]} more" if asked else ""
    if device.type != "cuda":
        return f"torch sees no GPU there; its process took {peak:.1f} GiB at the peak{more}"
    has = torch.cuda.get_device_properties(device).total_memory / _GIB
    cap = f", of which it might take {share:.0%}" if share < 1 else ""
    name = torch.cuda.get_device_name(device)
    return f"its tensors took {peak:.1f} GiB at the peak{more}; {name} has {has:.1f} GiB{cap}"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a user's own class may fail when it is asked
        return ""
