"""What a user may set of TCEP: defaults, the names of a search file, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from topotune.errors import ConfigError, UnknownNameError
from topotune.tcep.options import (
    GRADIENTS,
    LARGEST_BETA,
    LOOSEST,
    NAMES,
    NOISES,
    NUDGES,
    RECIRCULATIONS,
    SOLVERS,
    TIMED,
    Caps,
    Dynamics,
    Learning,
    Solver,
    read_options,
)

EVERYTHING: dict[str, Any] = {
    "lambda": 2.0,
    "recirculation": "fade",
    "gamma": 0.25,
    "kappa": 0.75,
    "T_time": 3,
    "c": 12.0,
    "sharpness": 0.5,
    "solver": "heun",
    "steps": 33,
    "tolerance": 1e-3,
    "step": 0.4,
    "cap_attention": 0.7,
    "cap_memory": 1.1,
    "cap_hidden": 0.0,
    "gradient": "bptt",
    "beta": 0.2,
    "nudge": "one_sided",
    "beta_start": 0.3,
    "beta_bound": 0.07,
    "correction": False,
    "noise": "poisson",
    "noise_level": 0.01,
    "probe_cosine": True,
}


def test_nothing_given_is_all_defaults() -> None:
    assert read_options({}) == (Dynamics(), Learning())
    assert read_options({"lr": 0.1, "field": "transformer"}) == (Dynamics(), Learning())


def test_every_name_of_a_search_file_arrives_where_it_belongs() -> None:
    dynamics, learning = read_options(EVERYTHING)
    assert dynamics == Dynamics(
        damping=2.0,
        recirculation="fade",
        gamma=0.25,
        kappa=0.75,
        time=3,
        scale=12.0,
        sharpness=0.5,
        solver=Solver("heun", 33, 1e-3, 0.4),
        caps=Caps(0.7, 1.1, 0.0),
    )
    assert learning == Learning("bptt", 0.2, "one_sided", 0.3, 0.07, False, "poisson", 0.01, True)
    assert read_options({"gamma_fraction": 0.4})[0].gamma_fraction == 0.4
    assert read_options({"T": 8})[0].period == 8


def test_the_list_of_names_is_complete() -> None:
    assert sorted(NAMES) == sorted({*EVERYTHING, "gamma_fraction", "T", "field"})


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("recirculation", RECIRCULATIONS),
        ("solver", SOLVERS),
        ("gradient", GRADIENTS),
        ("nudge", NUDGES),
        ("noise", NOISES),
    ],
)
def test_choices(name: str, known: tuple[str, ...]) -> None:
    for choice in known:
        read_options({name: choice})
    wrong: tuple[object, ...] = (known[0] + "x", known[0].upper(), "", 1, None, [known[0]])
    for value in wrong:
        with pytest.raises(UnknownNameError, match=f"unknown {name}") as caught:
            read_options({name: value})
        assert all(choice in str(caught.value) for choice in known)


ABOVE_ZERO = ("lambda", "T", "c", "sharpness", "tolerance", "step", "beta", "beta_start")
FROM_ZERO = ("kappa", "cap_attention", "cap_memory", "cap_hidden", "noise_level", "gamma_fraction")


@pytest.mark.parametrize("name", [*ABOVE_ZERO, *FROM_ZERO, "gamma", "beta_bound"])
def test_numbers_must_be_finite_numbers(name: str) -> None:
    for value in (math.nan, math.inf, -math.inf, True, [1.0], 1j):
        with pytest.raises(ConfigError, match=f"^{name}: must be a finite number"):
            read_options({name: value})


@pytest.mark.parametrize("name", [*ABOVE_ZERO, "beta_bound"])
def test_numbers_above_zero(name: str) -> None:
    read_options({name: 1e-9})
    for value in (0, 0.0, -1e-9):
        with pytest.raises(ConfigError, match=rf"^{name}: must be .* above 0.*\(got {value}\)"):
            read_options({name: value})


@pytest.mark.parametrize("name", FROM_ZERO)
def test_numbers_from_zero(name: str) -> None:
    read_options({name: 0})
    with pytest.raises(ConfigError, match=f"^{name}: must be .* of at least 0"):
        read_options({name: -1e-9})


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("gamma_fraction", 1),
        ("step", 1),
        ("beta_bound", 1),
        ("tolerance", LOOSEST),
        ("beta", LARGEST_BETA),
    ],
)
def test_numbers_up_to_a_most(name: str, most: float) -> None:
    read_options({name: most})
    with pytest.raises(ConfigError, match=rf"^{name}: must be .* at most {most:g} \(got "):
        read_options({name: 1.01 * most})


def test_gamma_may_be_negative() -> None:
    assert read_options({"gamma": -0.3})[0].gamma == -0.3


@pytest.mark.parametrize("steps", [0, -1, 1.0, "3", True, None])
def test_steps_are_whole(steps: object) -> None:
    with pytest.raises(ConfigError, match=r"^steps: must be a whole number of at least 1"):
        read_options({"steps": steps})


@pytest.mark.parametrize("name", ["correction", "probe_cosine"])
def test_switches(name: str) -> None:
    for value in (0, 1, "true", None):
        with pytest.raises(ConfigError, match=f"^{name}: must be true or false"):
            read_options({name: value})


def test_beta_is_a_number_or_learned() -> None:
    assert read_options({"beta": "learned"})[1].beta == "learned"
    with pytest.raises(ConfigError, match=r"^beta: .* or 'learned' \(got 'lerned'\)"):
        read_options({"beta": "lerned"})


def test_gamma_is_given_once() -> None:
    with pytest.raises(ConfigError, match=r"^gamma: is given twice: gamma 0.1 and .* 0.2"):
        read_options({"gamma": 0.1, "gamma_fraction": 0.2})


@pytest.mark.parametrize("kind", RECIRCULATIONS)
def test_tokens_and_time_are_two_parameters(kind: str) -> None:
    """A number in the wrong unit is refused by the name of the right one."""
    wrong, right = ("T", "T_time") if kind in TIMED else ("T_time", "T")
    read_options({"recirculation": kind, right: 2})
    if kind == "none":  # which takes neither, so that a space needs no condition for it
        read_options({"recirculation": kind, wrong: 2})
        return
    with pytest.raises(ConfigError) as caught:
        read_options({"recirculation": kind, wrong: 2})
    assert caught.value.place == wrong
    assert f"recirculation {kind!r} takes a" in str(caught.value)
    assert f"(got {wrong} 2)" in str(caught.value)
    assert f"Write {right}: 2" in str(caught.value)


@pytest.mark.parametrize(("time", "tokens"), [(0.5, 1), (2.6, 3), (4, 4)])
def test_a_time_where_tokens_are_meant_names_a_whole_number(time: float, tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"Write T: {tokens}$"):
        read_options({"recirculation": "shift", "T_time": time})


@pytest.mark.parametrize("kind", RECIRCULATIONS)
def test_only_solvers_that_step_through_time_take_a_past(kind: str) -> None:
    for solver in ("auto", "euler", "heun"):
        read_options({"recirculation": kind, "solver": solver})
    for solver in ("anderson", "dopri5"):
        if kind in TIMED:
            with pytest.raises(ConfigError, match=f"^solver: recirculation '{kind}' needs"):
                read_options({"recirculation": kind, "solver": solver})
        else:
            read_options({"recirculation": kind, "solver": solver})


@pytest.mark.parametrize(
    ("noise", "level", "noisy"),
    [("none", 0.0, False), ("none", 0.1, False), ("poisson", 0.0, False), ("gaussian", 0.1, True)],
)
def test_noise_needs_a_kind_and_a_level(noise: str, level: float, noisy: bool) -> None:
    assert Learning(noise=noise, noise_level=level).noisy is noisy


@pytest.mark.parametrize("build", [Solver, Caps, Dynamics, Learning])
def test_options_are_frozen(build: Callable[[], object]) -> None:
    made = build()
    name = next(iter(vars(made)))
    with pytest.raises(AttributeError, match="cannot assign to field"):
        setattr(made, name, 1.0)
