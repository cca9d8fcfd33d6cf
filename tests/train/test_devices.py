"""How much of a GPU a trial may take, and what is said when that was not enough."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest
import torch

from topotune.errors import CheckpointError, ResourceError
from topotune.train import devices
from topotune.train.devices import (
    cap_memory,
    check_gpus,
    lacks_memory,
    memory_in_words,
    memory_share,
)

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a missing GPU")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total")


@pytest.mark.parametrize(
    ("gpus", "wanted", "alone", "share"),
    [
        (0.25, "auto", False, 0.25),
        (1, "auto", False, 1.0),
        (2, "auto", False, 1.0),
        (0, "auto", False, 1.0),
        (0.25, 0.4, False, 0.4),
        (1, 0.9, False, 0.9),
        (0.25, "auto", True, 1.0),
        (0.25, 0.4, True, 1.0),
    ],
)
def test_the_share_of_memory_follows_the_share_of_the_gpu(
    gpus: float, wanted: float | Literal["auto"], alone: bool, share: float
) -> None:
    assert memory_share(gpus, wanted, alone) == share


@no_gpu
def test_the_cap_is_set_on_every_gpu_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[float, int]] = []
    cap_memory(0.5)  # torch sees no GPU: nothing to cap, and nothing fails
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, index: calls.append((share, index)),
    )
    cap_memory(0.5)
    cap_memory(1)
    assert calls == [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1)]
    assert all(isinstance(share, float) for share, _ in calls)  # torch refuses an int


@gpu
def test_a_capped_process_gets_no_more_and_a_later_one_does() -> None:
    size = int(torch.cuda.get_device_properties(0).total_memory * 0.2)
    cap_memory(0.1)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(size, dtype=torch.uint8, device="cuda")
    assert lacks_memory(caught.value)
    assert "of which it might take 10%" in memory_in_words(caught.value, 0.1)
    cap_memory(1)
    assert torch.empty(size, dtype=torch.uint8, device="cuda").numel() == size


def _raised_from(cause: BaseException) -> BaseException:
    try:
        raise CheckpointError("does not fit") from cause
    except CheckpointError as error:
        return error


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (FULL, True),
        (torch.cuda.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (_raised_from(FULL), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate"),
            False,
        ),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("CUDA out of memory"), False),
        (MemoryError(), False),
        (_raised_from(KeyError("x")), False),
    ],
)
def test_a_full_gpu_is_told_from_other_faults(error: BaseException, lacks: bool) -> None:
    assert lacks_memory(error) is lacks


def test_a_cpus_real_allocator_is_none_of_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert not lacks_memory(caught.value)


@no_gpu
def test_the_peak_is_told_where_there_is_no_gpu() -> None:
    words = memory_in_words(FULL, 0.5)
    found = re.fullmatch(
        r"torch sees no GPU there; its process took ([0-9.]+) GiB at the peak when it asked for "
        r"20.00 GiB more",
        words,
    )
    assert found
    assert float(found[1]) > 0


@no_gpu
def test_the_peak_and_what_the_device_has_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 71.25 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert memory_in_words(FULL, 1.0) == (
        "its tensors took 71.2 GiB at the peak when it asked for 20.00 GiB more; NVIDIA H100 has "
        "80.0 GiB"
    )
    assert memory_in_words(RuntimeError("CUDA error: out of memory"), 0.5) == (
        "its tensors took 71.2 GiB at the peak; NVIDIA H100 has 80.0 GiB, of which it might take "
        "50%"
    )


@no_gpu
def test_a_gpu_that_torch_does_not_see_is_not_left_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_HARDWARE", (tmp_path / "nvidia0",))
    check_gpus(1)  # declared by the cluster, and not there: the CPU is all that there is
    (tmp_path / "nvidia0").touch()
    check_gpus(0)
    with pytest.raises(ResourceError, match=r"holds 0.5 GPU\(s\) and this machine has some"):
        check_gpus(0.5)
