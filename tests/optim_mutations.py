"""Random models and random mutations of an optimizer's state: run as a child process.

``python -m tests.optim_mutations FIRST COUNT`` prints a line before and after each case, so that
a process that dies names the case. Each case trains a small model, mutates the state dict that is
loaded, the state, or the parameters, and goes on. Allowed is what torch's Adam does, bit for bit
(the correction is switched off, and torch's plain loop checks its sizes), or an error of ours that
names a parameter and leaves everything as it was.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from topotune.optim import TopologicalAdam

torch.set_num_threads(1)

TYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)


def reshaped(value: Tensor, rng: random.Random) -> Tensor:
    """Another tensor in its place: larger, smaller, of another shape, type or layout."""
    flat = value.detach().reshape(-1)
    choices: list[Callable[[], Tensor]] = [
        lambda: torch.cat([flat, torch.zeros(rng.choice([1, 7, 5000]), dtype=value.dtype)]),
        lambda: flat[: flat.numel() // 2].clone(),
        lambda: flat.clone(),
        lambda: value.detach()[None],
        lambda: value.detach().to(rng.choice(TYPES)),
        lambda: torch.stack([value.detach()] * 2, dim=-1)[..., 0],
        lambda: torch.zeros((), dtype=value.dtype).expand(value.shape),
        lambda: value.detach().clone(),
    ]
    return rng.choice(choices)()


def damaged(entry: Any, rng: random.Random) -> Any:
    """A mutation of one entry of a state."""
    if isinstance(entry, Tensor) and rng.random() < 0.8:
        return reshaped(entry, rng)
    return rng.choice([3, 2.0, "text", None, [1.0], torch.zeros(()), torch.zeros(2, 2)])


def mutate_state(state: dict[Any, dict[str, Any]], rng: random.Random) -> str:
    """Damage, remove or swap an entry; the same for every optimizer with the same ``rng``."""
    key = rng.choice(list(state))
    # What torch's Adam has not got must not shift the choices: only its entries are drawn.
    name = rng.choice(["step", "exp_avg", "exp_avg_sq"])
    other = rng.choice(list(state))
    what = rng.choice(["entry", "entry", "entry", "remove", "swap", "clear"])
    if what == "entry":
        state[key][name] = damaged(state[key][name], rng)
    elif what == "remove":
        del state[key][name]
    elif what == "swap":
        state[key][name], state[other][name] = state[other][name], state[key][name]
    else:
        state[key].clear()
    return f"{what} {name} of {key if isinstance(key, int) else 'a parameter'}"


def mutate_fields(
    optimizer: TopologicalAdam, tensors: list[nn.Parameter], rng: random.Random
) -> str:
    """Damage an entry that only this class has."""
    state = optimizer.state[rng.choice(tensors)]
    names = sorted(state.keys() - {"step", "exp_avg", "exp_avg_sq"})
    if not names:
        return "nothing"
    name = rng.choice(names)
    if rng.random() < 0.3:
        del state[name]
    elif rng.random() < 0.3:
        state[name].data = reshaped(state[name], rng).clone()
    else:
        state[name] = damaged(state[name], rng)
    return f"field {name}"


def gradients(tensors: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def attempt(action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - which one it is, is what is asserted
        return error
    return None


def exchange(tensors: list[nn.Parameter], rng: random.Random) -> str:
    tensor = rng.choice(tensors)
    tensor.grad = None
    tensor.data = reshaped(tensor, rng).clone()
    return f"data of shape {tuple(tensor.shape)}"


def run(seed: int) -> str:
    """One case; returns what came out.

    Raises:
        AssertionError: neither torch's behaviour nor an error that left everything as it was.
    """
    rng = random.Random(seed)
    dtype = rng.choice(TYPES)
    shapes = [
        tuple(rng.choice([0, 1, 2, 5, 33]) for _ in range(rng.randrange(3)))
        for _ in range(rng.randrange(1, 4))
    ]
    torch.manual_seed(seed)
    start = [torch.randn(shape).to(dtype) for shape in shapes]
    coupling = rng.choice(["uniform", "exchange", "local"])
    ours = [nn.Parameter(value.clone()) for value in start]
    theirs = [nn.Parameter(value.clone()) for value in start]
    live = [nn.Parameter(value.clone()) for value in start]
    plain = TopologicalAdam(ours, w_topo=0.0, coupling=coupling, foreach=False)
    torchs = torch.optim.Adam(theirs, foreach=False)
    fused = TopologicalAdam(live, coupling=coupling)
    trio = ((plain, ours), (torchs, theirs), (fused, live))
    for optimizer, tensors in trio:
        for turn in range(2):
            gradients(tensors, turn)
            optimizer.step()
    where = rng.choice(["dict", "state", "data", "fields"])
    spoken, errors = "", []
    for optimizer, tensors in trio:
        again = random.Random(seed + 1)
        refused = None
        before = copy.deepcopy([p.detach() for p in tensors])
        if where == "dict":
            saved = copy.deepcopy(optimizer.state_dict())
            spoken = mutate_state(saved["state"], again)
            refused = attempt(lambda o=optimizer, s=saved: o.load_state_dict(s))  # type: ignore[misc]
        elif where == "state":
            spoken = mutate_state(optimizer.state, again)
        elif where == "data":
            spoken = exchange(tensors, again)
            before = copy.deepcopy([p.detach() for p in tensors])
        elif isinstance(optimizer, TopologicalAdam):
            spoken = mutate_fields(optimizer, tensors, again)
        if refused is None:
            gradients(tensors, 9)
            refused = attempt(optimizer.step)
        errors.append(refused)
        if refused is not None and isinstance(optimizer, TopologicalAdam):
            text = f"{type(refused).__name__}: {refused}"
            assert isinstance(refused, ValueError), f"{spoken}: {text}"
            assert "parameter " in text, f"{spoken}: {text}"
            after = [p.detach() for p in tensors]
            same = all(map(torch.equal, before, after))
            assert same, f"{spoken}: a parameter moved before {text}"
    if errors[0] is None and errors[1] is None:
        pairs = zip(ours, theirs, strict=True)
        equal = all(torch.equal(p.nan_to_num(), q.nan_to_num()) for p, q in pairs)
        assert equal, f"{spoken}: not torch's result"
    return f"{where}: {spoken}: {'refused' if errors[2] else 'went on'}"


def main(first: int, count: int) -> None:
    for seed in range(first, first + count):
        print(f"case {seed}", flush=True)
        print(run(seed), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
