"""The process of a trial: devices, and a state that no earlier trial can be seen in."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch

from topotune.errors import ConfigError, ResourceError
from topotune.train.process import provenance, reset_process_state, resolve_device

CPU = torch.device("cpu")


def test_devices_by_name() -> None:
    assert resolve_device("cpu") == CPU
    expected = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto") == torch.device(expected)


@pytest.mark.parametrize("name", ["gpu", "", "cuda0", "cuda:", "cuda:-1", "cpu:0", "mps"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown device"):
        resolve_device(name)


def test_a_device_that_is_not_there_is_a_matter_of_resources() -> None:
    with pytest.raises(ResourceError, match=r"'cuda:4096': torch sees \d+ GPU"):
        resolve_device("cuda:4096")


def test_nothing_of_an_earlier_trial_is_left() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.autograd.set_detect_anomaly(True)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(2)
    np.seterr(all="raise")

    reset_process_state(seed=5, threads=1, device=CPU)

    drawn = torch.rand(2)
    assert (drawn.dtype, drawn.device) == (torch.float32, CPU)
    assert torch.is_grad_enabled()
    assert not torch.is_anomaly_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.benchmark
    assert torch.get_num_threads() == 1
    assert np.geterr() == {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}


def test_zero_threads_gives_torchs_own_choice_back() -> None:
    reset_process_state(seed=0, threads=0, device=CPU)
    own = torch.get_num_threads()
    for threads in (own + 1, 0):
        reset_process_state(seed=0, threads=threads, device=CPU)
    assert torch.get_num_threads() == own


def test_the_seed_reaches_every_generator() -> None:
    def draws(seed: int) -> tuple[float, float, float]:
        reset_process_state(seed=seed, threads=1, device=CPU)
        return random.random(), float(np.random.random()), torch.rand(1).item()

    first, second, other = draws(2**62 + 1), draws(2**62 + 1), draws(2**62 + 2)
    assert first == second
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_provenance_names_versions_device_and_host() -> None:
    tags = provenance(CPU)
    assert tags["version.numpy"] == np.__version__
    assert tags["device"] == "cpu"
    assert all(isinstance(value, str) and value for value in tags.values())
    assert tags["device_count"] == "0"
    assert "device_memory" not in tags


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_provenance_counts_the_gpus_and_names_their_memory() -> None:
    tags = provenance(torch.device("cuda:0"))
    assert tags["device_name"] == torch.cuda.get_device_name(0)
    assert tags["device_count"] == str(torch.cuda.device_count())
    assert re.fullmatch(r"[0-9]+\.[0-9] GiB", tags["device_memory"])
