"""Figures: what is drawn is read back from the pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from numpy.typing import NDArray

from topotune.errors import ConfigError, ResourceError, RunError
from topotune.records import TrialSummary
from topotune.results import figure as fig
from topotune.results.leaderboard import Leaderboard
from topotune.results.plots import plot_curves, plot_front, plot_history
from topotune.results.trace import LIMIT, envelope, medians, plot_trace, read_trace

Image = NDArray[np.uint8]
HOSTILE = "$\\frac{$ 100% \x1b[31m 日本 \udc80 _x_ <b>\n" + "x" * 200
UP = {"val_accuracy": "maximize"}
PHASES = ("free", "nudged")


def read(path: Path) -> Image:
    image: Image = (imread(path)[:, :, :3] * 255).round().astype(np.uint8)
    return image


def mask(image: Image, colour: str) -> NDArray[np.bool_]:
    """Where pixels have exactly a colour: the core of a line or a mark, not its soft edge."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.asarray((image == wanted).all(axis=2))


def colours(image: Image) -> int:
    """How many different colours there are."""
    return len(np.unique(image.astype(np.int64) @ [1 << 16, 1 << 8, 1]))


def has(image: Image, colour: str) -> bool:
    return bool(mask(image, colour).sum() >= 4)


def save(path: Path, **arrays: object) -> Path:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def full(steps: int = 300) -> dict[str, NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    step = np.arange(1.0, steps + 1)
    return {
        "step": step,
        "loss": 2.3 * np.exp(-step / steps * 5) + 0.01,
        "grad_norm": np.exp(rng.standard_normal(steps)),
        "energy": 1e-3 * np.exp(2 * rng.standard_normal(steps)),
        "energy_controlled": np.full(steps, 1e-3),
        "coupling_current": 1e-4 * rng.random(steps),
    }


def test_a_full_trace_shows_every_series_in_its_panel(tmp_path: Path) -> None:
    npz, png = save(tmp_path / "t.npz", **full()), tmp_path / "sub" / "t.png"
    plot_trace(npz, png, "digits, trial 3")
    image = read(png)
    height, *rest = image.shape
    assert height in (951, 952)  # 5.95 inches; Matplotlib before 3.11 cuts off what others round
    assert rest == [fig.WIDTH * fig.DPI, 3]
    rows = {
        colour: np.flatnonzero(mask(image, colour).any(axis=1))
        for colour in (fig.BLUE, fig.GREEN, fig.PURPLE, fig.ORANGE)
    }
    third = image.shape[0] / 3
    assert rows[fig.BLUE].min() < third  # the loss, and the controlled energy at the bottom
    assert rows[fig.BLUE].max() > 2 * third
    assert third < rows[fig.GREEN].min() < rows[fig.PURPLE].max() < 2 * third + 30
    assert rows[fig.ORANGE].min() > 1.9 * third
    assert list(tmp_path.rglob("*.tmp")) == []


def test_a_network_that_relaxes_has_panels_for_its_energies_residuals_and_evaluations(
    tmp_path: Path,
) -> None:
    step = np.arange(1.0, 101)
    plain = {"step": step, "loss": 1 / step}
    heights, orange = [], []
    for names in ((), ("energy",), ("residual", "nfe"), ("energy", "residual", "nfe")):
        arrays = plain | {f"{n}_{p}": step + i for n in names for i, p in enumerate(PHASES)}
        plot_trace(save(tmp_path / "t.npz", **arrays), tmp_path / "t.png")
        image = read(tmp_path / "t.png")
        heights.append(image.shape[0])
        orange.append(has(image, fig.ORANGE))
    panel = round(1.75 * fig.DPI)
    assert np.diff(heights).tolist() == pytest.approx([panel, panel, panel], abs=1)
    assert orange == [False, True, True, True]


def test_the_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    arrays = full(50)
    npz = save(tmp_path / "t.npz", step=arrays["step"], loss=arrays["loss"])
    for name in ("a.png", "b.png"):
        plot_trace(npz, tmp_path / name, "t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    plot_trace(npz, tmp_path / "c.png", "another")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_a_spike_of_one_step_in_a_long_trace_is_visible(tmp_path: Path) -> None:
    loss = np.full(50_000, 0.1)
    images = []
    for name in ("flat", "spike"):
        npz = save(tmp_path / f"{name}.npz", step=np.arange(50_000), loss=loss)
        plot_trace(npz, tmp_path / f"{name}.png")
        images.append(read(tmp_path / f"{name}.png"))
        loss[31_234] = 0.2
    changed = (images[1] != 255).any(axis=2) & (images[0] == 255).all(axis=2)
    columns = np.flatnonzero(changed[:, 150:].sum(axis=0) > 100) + 150
    left, right = 0.8 * fig.DPI, (fig.WIDTH - 0.15) * fig.DPI
    inner = (right - left) / 1.1  # matplotlib leaves a margin of 5 % on both sides
    expected = left + 0.05 * inner + inner * 31_234 / 50_000
    assert columns.size
    assert np.abs(columns - expected).max() < 3


def test_what_is_not_finite_is_marked_where_it_begins(tmp_path: Path) -> None:
    arrays = full(400)
    arrays["loss"][250:] = math.nan
    npz = save(tmp_path / "t.npz", **arrays)
    assert read_trace(npz).first_nonfinite == 251
    plot_trace(npz, tmp_path / "t.png")
    image = read(tmp_path / "t.png")
    red = np.flatnonzero(mask(image, fig.RED).sum(axis=0) > 30)
    inner = (fig.WIDTH - 0.95) * fig.DPI / 1.1
    expected = 0.8 * fig.DPI + 0.05 * inner + inner * 250 / 399
    assert red.size
    assert np.abs(red - expected).max() < 3


HOSTILE_SERIES: dict[str, list[float]] = {
    "all NaN": [math.nan] * 5,
    "all infinite": [math.inf, -math.inf] * 3,
    "largest floats": [1.7e308, -1.7e308, 1.0],
    "smallest floats": [5e-324, 1e-300, 1e-310],
    "two hundred decades": [1e-100, 1.0, 1e100],
    "constant": [3.0] * 40,
    "constant zero": [0.0] * 40,
    "differs by rounding": [1.0, math.nextafter(1.0, 2.0)] * 20,
    "one point": [2.0],
    "one point among NaN": [math.nan, 2.0, math.nan],
    "zeros among positives": [0.0] + [1e-3, 1.0] * 20,
    "negative": [-5.0, 3.0, -1e-9],
    "huge negative": [-1e99, -1e99],
}


NAMES = [*HOSTILE_SERIES, "all NaN"]


@pytest.mark.parametrize("pair", list(zip(NAMES[::2], NAMES[1::2], strict=True)), ids=" / ".join)
def test_hostile_series_are_drawn_without_a_warning(tmp_path: Path, pair: tuple[str, str]) -> None:
    loss, energy = (np.full(42, np.nan) for _ in pair)
    for array, name in zip((loss, energy), pair, strict=True):
        array[: len(HOSTILE_SERIES[name])] = HOSTILE_SERIES[name]
    npz = save(tmp_path / "t.npz", step=np.arange(42), loss=loss, energy=energy)
    plot_trace(npz, tmp_path / "t.png", HOSTILE)
    image = read(tmp_path / "t.png")
    assert image.shape == (round(4.2 * fig.DPI), fig.WIDTH * fig.DPI, 3)
    assert has(image, fig.BLUE) == bool((np.abs(loss) <= fig.HUGE).any())
    panel = image[round(2.5 * fig.DPI) :]  # below the legend, which always shows the colour
    assert has(panel, fig.ORANGE) == bool((np.abs(energy) <= fig.HUGE).any())


@pytest.mark.parametrize(
    "arrays",
    [
        {"step": np.arange(0), "loss": np.arange(0.0)},
        {"step": np.arange(3)},
        {"step": np.full(3, np.nan), "loss": np.ones(3), "grad_norm": np.ones(3)},
    ],
    ids=["no steps", "no series", "no finite step"],
)
def test_an_empty_trace_says_so(tmp_path: Path, arrays: dict[str, NDArray[np.float64]]) -> None:
    plot_trace(save(tmp_path / "t.npz", **arrays), tmp_path / "t.png")
    image = read(tmp_path / "t.png")
    assert mask(image, fig.GREY).sum() > 50  # the note's letters
    assert not has(image, fig.BLUE)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"loss": np.ones(3)}, "no array 'step'"),
        ({"step": np.arange(3), "loss": np.ones(4)}, r"'loss' is float64 of shape \(4,\)"),
        ({"step": np.arange(3), "energy": np.ones((3, 1))}, r"'energy'.*\(3, 1\), expected 3"),
        ({"step": np.arange(3), "loss": np.array(["a", "b", "c"])}, "'loss' is <U1"),
        ({"step": np.arange(2), "loss": np.array([1j, 2])}, "complex128"),
        ({"step": np.arange(2), "loss": np.array([{}, []], dtype=object)}, "not a readable"),
        ({"step": np.float64(1)}, r"'step' is float64 of shape \(\)"),
    ],
)
def test_a_malformed_trace_is_refused(
    tmp_path: Path, arrays: dict[str, NDArray[np.float64]], match: str
) -> None:
    npz = save(tmp_path / "t.npz", **arrays)
    with pytest.raises(RunError, match=match):
        plot_trace(npz, tmp_path / "t.png")
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "flipped", "single array"])
def test_a_damaged_trace_is_refused(tmp_path: Path, damage: str) -> None:
    npz = save(tmp_path / "t.npz", **full(100))
    content = bytearray(npz.read_bytes())
    if damage == "missing":
        npz.unlink()
    elif damage == "text":
        npz.write_text("hello")
    elif damage == "cut":
        npz.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[100:160] = bytes(60)
        npz.write_bytes(content)
    else:
        with npz.open("wb") as file:
            np.save(file, np.ones(3))
    with pytest.raises(RunError, match=r"t\.npz"):
        plot_trace(npz, tmp_path / "t.png")
    assert not (tmp_path / "t.png").exists()


def test_an_unwritable_place_is_named_and_an_old_picture_stays(tmp_path: Path) -> None:
    npz = save(tmp_path / "t.npz", **full(20))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match=r"file/t\.png"):
        plot_trace(npz, tmp_path / "file" / "t.png")
    taken = tmp_path / "taken.png"
    taken.mkdir()
    with pytest.raises(ResourceError, match=r"taken\.png"):
        plot_trace(npz, taken)
    assert list(taken.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "t.npz", "taken.png"]


series = st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=60)


@given(series, st.integers(1, 10).map(lambda n: 2 * n))
def test_the_envelope_keeps_extremes_and_order(values: list[float], limit: int) -> None:
    y = np.asarray(values)
    x = np.arange(len(y), dtype=np.float64)
    thin_x, thin_y = envelope(x, y, limit)
    assert len(thin_x) == len(thin_y) <= max(limit, 1)
    assert (np.diff(thin_x) > 0).all()
    kept = np.isfinite(thin_y)
    assert (thin_y[kept] == y[thin_x[kept].astype(int)]).all()
    finite = y[np.isfinite(y)]
    assert kept.any() == bool(finite.size)
    if finite.size:
        assert thin_y[kept].min() == finite.min()
        assert thin_y[kept].max() == finite.max()


def test_a_gap_wider_than_a_bin_stays_a_gap() -> None:
    y = np.ones(10 * LIMIT)
    y[4 * LIMIT : 5 * LIMIT] = np.nan
    x = np.arange(len(y), dtype=np.float64)
    thin_x, thin_y = envelope(x, y)
    inside = (thin_x > 4 * LIMIT + 20) & (thin_x < 5 * LIMIT - 20)
    assert inside.any()
    assert np.isnan(thin_y[inside]).all()
    assert np.isfinite(thin_y[~inside]).sum() > 0.8 * len(thin_y[~inside])


def test_medians_ignore_spikes_and_gaps() -> None:
    y = np.repeat([1.0, 2.0, np.nan, 4.0], 25)
    y[[3, 30, 90]] = [1e9, np.nan, -np.inf]
    x, middle = medians(np.arange(100.0), y, bins=4)
    np.testing.assert_array_equal(middle, [1.0, 2.0, np.nan, 4.0])
    np.testing.assert_array_equal(x, [12, 37, 62, 87])


def trial(number: int, state: str, *curve: float, violated: bool = False) -> TrialSummary:
    return TrialSummary(
        number,
        state,
        curve={epoch: value for epoch, value in enumerate(curve, start=1)},  # noqa: C416
        values=(curve[-1],) if state == "COMPLETE" else (),
        violated=("overhead_vs_adam: 1.3 > 1.2",) if violated else (),
    )


def board(trials: Sequence[TrialSummary], objectives: Mapping[str, str]) -> Leaderboard:
    return Leaderboard.of(trials, "", objectives)


SEARCH = [
    trial(0, "COMPLETE", 0.5, 0.6, 0.7),
    trial(1, "PRUNED", 0.3),
    trial(2, "DIVERGED", 0.4, math.nan),
    trial(3, "COMPLETE", 0.6, 0.8, 0.9),
    trial(4, "FAILED"),
    trial(5, "RUNNING", 0.2),
    trial(6, "COMPLETE", 0.7, 0.9, 0.97, violated=True),
    trial(7, "WAITING"),
]


def test_history_colours_the_outcomes_and_draws_the_best_so_far(tmp_path: Path) -> None:
    png = tmp_path / "h.png"
    plot_history(board(SEARCH, UP), png, "digits")
    image = read(png)
    assert image.shape == (round(3.6 * fig.DPI), fig.WIDTH * fig.DPI, 3)
    for colour in (fig.BLUE, fig.ORANGE, fig.RED, fig.INK):
        assert has(image, colour), colour
    plot_history(board([SEARCH[0]], UP), png)
    assert not has(read(png), fig.ORANGE)
    assert not has(read(png), fig.RED)


@pytest.mark.parametrize(("direction", "falls"), [("maximize", False), ("minimize", True)])
def test_best_so_far_moves_in_the_direction_of_the_objective(
    tmp_path: Path, direction: str, falls: bool
) -> None:
    trials = [trial(n, "COMPLETE", v) for n, v in enumerate([0.5, 0.1, 0.9, 0.4])]
    plot_history(board(trials, {"m": direction}), tmp_path / "h.png")
    ink = mask(read(tmp_path / "h.png"), fig.INK)[:455]  # above the labels and the legend
    first, last = (ink[:, part].sum(axis=1) for part in (slice(150, 350), slice(800, 1050)))
    assert first.max() > 100  # the line begins in the left part and goes on in the right one
    assert last.max() > 100
    assert bool(last.argmax() > first.argmax() + 40) is falls
    assert bool(last.argmax() < first.argmax() - 40) is not falls


def test_curves_highlight_the_right_trial(tmp_path: Path) -> None:
    trials = [trial(0, "COMPLETE", 0.5, 0.1), trial(1, "COMPLETE", 0.5, 0.9)]
    plot_curves(board(trials, UP), tmp_path / "c.png")
    right = mask(read(tmp_path / "c.png"), fig.INK)[:440, 700:]
    rows = np.flatnonzero(right.any(axis=1))
    assert rows.size
    assert rows.max() < 240  # the upper half only


def test_curves_highlight_the_feasible_best(tmp_path: Path) -> None:
    png = tmp_path / "c.png"
    plot_curves(board(SEARCH, UP), png, "digits")
    with_best = mask(read(png), fig.INK).sum()
    plot_curves(board([t for t in SEARCH if t.number not in (0, 3)], UP), png, "digits")
    without = mask(read(png), fig.INK).sum()
    assert with_best > without + 1000
    assert colours(read(png)) > 50


@pytest.mark.parametrize("plot", [plot_history, plot_curves])
@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial(0, "COMPLETE", math.nan), trial(1, "PRUNED", math.inf)],
        [trial(0, "COMPLETE", 1e308, -1e308), trial(1, "COMPLETE", -1e308, 1e99)],
        [trial(0, "COMPLETE", 0.0), trial(1, "COMPLETE", 0.0)],
        [trial(0, "COMPLETE", 1e-90, 1e90), trial(100_000, "COMPLETE", 1e-90)],
        [trial(0, "FAILED", 0.1), trial(1, "LATER_STATE", 0.2)],
    ],
    ids=["none", "not finite", "huge", "constant", "wide", "lost"],
)
def test_odd_searches_are_drawn_without_a_warning(
    tmp_path: Path, plot: type, trials: list[TrialSummary]
) -> None:
    plot(board(trials, {HOSTILE: "minimize"}), tmp_path / "p.png", HOSTILE)
    image = read(tmp_path / "p.png")
    assert image.shape == (round(3.6 * fig.DPI), fig.WIDTH * fig.DPI, 3)
    assert colours(image) > 10


GOALS = {"val_accuracy": "maximize", "val_loss": "minimize", "overhead_vs_adam": "minimize"}


def of_several(number: int, *values: float, **more: Any) -> TrialSummary:
    """Ends at these values; the third objective is no epoch's, as an overhead is none."""
    curve, loss = {1: values[0] / 2, 2: values[0]}, {1: 2 * values[1], 2: values[1]}
    return TrialSummary(number, "COMPLETE", "", {}, values, {}, curve, (loss, {}), **more)


def test_every_objective_with_a_curve_has_a_panel_and_the_front_is_highlighted(
    tmp_path: Path,
) -> None:
    trials = [
        of_several(0, 0.9, 0.5, 1.2),
        of_several(1, 0.8, 0.2, 1.3),
        of_several(2, 0.7, 0.9, 2),
    ]
    png = tmp_path / "c.png"
    plot_curves(board(trials, GOALS), png)
    image = read(png)
    # Two of the three have curves; some Matplotlibs cut the broken pixel off.
    assert image.shape[0] == pytest.approx((2 * 2.4 + 0.8) * fig.DPI, abs=1.1)
    half = image.shape[0] // 2 - 30
    for panel in (image[:half], image[half:]):
        assert mask(panel, fig.INK).sum() > 1000
        assert has(panel, "#80B8D8") or colours(panel) > 50  # the pale line of trial 2
    both = mask(image, fig.INK).sum()
    worse = [of_several(0, 0.9, 0.5, 1.2), of_several(1, 0.8, 0.6, 1.3)]
    plot_curves(board(worse, GOALS), png)
    assert mask(read(png), fig.INK).sum() < both - 1000
    plot_history(board(trials, GOALS), png)
    assert read(png).shape[0] == pytest.approx((3 * 2.4 + 0.8) * fig.DPI, abs=1.1)


def test_the_front_stands_in_the_plane_of_every_two_objectives(tmp_path: Path) -> None:
    png, heights = tmp_path / "f.png", []
    trials = [
        of_several(0, 0.9, 0.5, 1.2),
        of_several(1, 0.8, 0.2, 1.3),
        of_several(2, 0.7, 0.9, 2),
    ]
    for count in (2, 3):
        goals = dict(list(GOALS.items())[:count])
        cut = [replace(t, values=t.values[:count]) for t in trials]
        plot_front(board(cut, goals), png, "digits")
        image = read(png)
        heights.append(image.shape[0])
        assert has(image, fig.BLUE)
        assert has(image, fig.INK)
    assert heights == [pytest.approx(n * 3.6 * fig.DPI, abs=1.1) for n in (1, 3)]
    many = {f"m{i}": "maximize" for i in range(7)}
    plot_front(board([TrialSummary(0, "COMPLETE", values=(1.0,) * 7)], many), png)
    assert read(png).shape[0] == pytest.approx(6 * 3.6 * fig.DPI, abs=1.1)
    plot_front(board([of_several(0, 0.9, 0.5, 1.2, violated=("x",))], GOALS), png)
    assert mask(read(png)[: 3 * 500], fig.INK).sum() < 5000  # axes and letters, no front


def test_the_front_lies_where_its_values_are(tmp_path: Path) -> None:
    """In one plane, the better of two stands right of and below the other."""
    goals = {"val_accuracy": "maximize", "val_loss": "minimize"}
    two = [
        TrialSummary(0, "COMPLETE", values=(0.1, 0.9)),
        TrialSummary(1, "COMPLETE", values=(0.9, 0.1)),
    ]
    plot_front(board(two, goals), tmp_path / "f.png")
    image = read(tmp_path / "f.png")
    area = image[:470, 120:]  # above the labels and the legend
    blue, ink = (np.argwhere(mask(area, colour)) for colour in (fig.BLUE, fig.INK))
    dots = ink[ink[:, 1] > 700]
    assert len(dots) > 50
    assert dots.mean(axis=0)[0] > blue.mean(axis=0)[0] + 100
    assert dots.mean(axis=0)[1] > blue.mean(axis=0)[1] + 300


@pytest.mark.parametrize("objectives", [{}, {"m": "up"}])
def test_wrong_objectives_are_refused(objectives: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="directions"):
        board(SEARCH, objectives)
