"""The figure of relaxations: what is drawn is read back from the pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray

from topotune.errors import ResourceError, RunError
from topotune.results import figure as fig
from topotune.results.relaxation import LINES, plot_relaxation, read_relaxations, spread_out

Array = NDArray[np.float64]


def save(path: Path, **arrays: object) -> Path:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def curves(epochs: int, steps: int = 20) -> dict[str, Array]:
    """Energies that fall by half a step to -100, residuals by two thirds; ragged ends."""
    time = np.tile(np.arange(steps) * 0.5, (epochs, 1))
    for row in range(epochs):
        time[row, steps - row % 4 :] = np.nan
    return {
        "epoch": np.arange(1.0, epochs + 1),
        "time": time,
        "energy": -100 + 8 * 0.5 ** (2 * time) + 0 * time,
        "residual": 3.0 ** (-2 * time),
    }


def colours_of(path: Path) -> list[set[tuple[int, int, int]]]:
    """The colours of the upper and of the lower panel, greys left out."""
    image = (imread(path)[:, :, :3] * 255).round().astype(int)
    plots = image[:, : int(image.shape[1] * 0.9)]  # without the key
    found = []
    for half in np.array_split(plots, 2):
        vivid = half[(half.max(axis=2) - half.min(axis=2)) > 40]
        found.append({(int(r), int(g), int(b)) for r, g, b in vivid})
    return found


@pytest.mark.parametrize(("epochs", "lines"), [(1, 1), (5, 5), (12, 12), (13, 12), (500, 12)])
def test_the_epochs_shown_are_spread_from_first_to_last(epochs: int, lines: int) -> None:
    found = spread_out(epochs)
    assert len(found) == lines <= LINES
    assert (found[0], found[-1]) == (0, epochs - 1)
    gaps = np.diff(found)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def test_every_epoch_has_a_colour_of_its_own_in_both_panels(tmp_path: Path) -> None:
    import matplotlib

    npz = save(tmp_path / "r.npz", **curves(4))
    plot_relaxation(npz, tmp_path / "r.png", "digits, trial 3")
    wanted = {
        tuple(round(255 * part) for part in colour[:3])
        for colour in matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, 4))
    }
    for panel in colours_of(tmp_path / "r.png"):
        assert wanted <= panel


def test_the_energy_is_drawn_from_its_own_end(tmp_path: Path) -> None:
    arrays = curves(3)
    for name, shift in (("low", 0.0), ("high", 512.0)):  # a shift that rounds nothing
        moved = {**arrays, "energy": arrays["energy"] + shift}
        plot_relaxation(save(tmp_path / f"{name}.npz", **moved), tmp_path / f"{name}.png")
    images = [imread(tmp_path / f"{name}.png") for name in ("low", "high")]
    assert np.abs(images[0] - images[1]).max() < 0.02
    other = {**arrays, "energy": arrays["energy"] * 2}
    plot_relaxation(save(tmp_path / "o.npz", **other), tmp_path / "o.png")
    assert np.abs(imread(tmp_path / "o.png") - images[0]).max() > 0.5


def test_a_field_without_an_energy_has_one_panel(tmp_path: Path) -> None:
    arrays = curves(3)
    del arrays["energy"]
    plot_relaxation(save(tmp_path / "r.npz", **arrays), tmp_path / "r.png")
    two = curves(3)
    plot_relaxation(save(tmp_path / "two.npz", **two), tmp_path / "two.png")
    heights = [imread(tmp_path / f"{name}.png").shape[0] for name in ("r", "two")]
    assert heights == [3 * fig.DPI, 5 * fig.DPI]


@pytest.mark.parametrize(
    "change",
    [
        {"energy": np.full((2, 20), np.nan), "residual": np.full((2, 20), np.nan)},
        {"energy": np.full((2, 20), 1e300), "residual": np.full((2, 20), np.inf)},
        {"energy": np.zeros((2, 20)), "residual": np.zeros((2, 20))},
        {"energy": -np.cumsum(np.ones((2, 20)), axis=1), "residual": -np.ones((2, 20))},
        {"epoch": np.empty(0), **dict.fromkeys(("time", "energy", "residual"), np.empty((0, 0)))},
        {"time": np.full((2, 20), np.nan)},
        dict.fromkeys(("time", "energy", "residual"), np.ones((2, 1))),
    ],
    ids=["nan", "huge", "zero", "negative", "empty", "no time", "one step"],
)
def test_odd_relaxations_are_drawn_without_a_warning(
    tmp_path: Path, change: dict[str, Array]
) -> None:
    npz = save(tmp_path / "r.npz", **{**curves(2), **change})
    plot_relaxation(npz, tmp_path / "r.png", "$\\frac{$ 日本 \udc80")
    assert imread(tmp_path / "r.png").shape[1] == fig.WIDTH * fig.DPI


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epoch": None}, "no array 'epoch'"),
        ({"time": None}, "no array 'time'"),
        ({"energy": np.ones((2, 3))}, "array 'energy' is float64 of shape"),
        ({"epoch": np.ones(5)}, r"array 'epoch' .* expected real numbers of shape \(epochs,\)"),
        ({"time": np.ones(20)}, "expected real numbers"),
        ({"residual": np.full((2, 20), "x")}, "array 'residual' is <U1"),
    ],
)
def test_a_malformed_archive_is_refused(
    tmp_path: Path, change: dict[str, Array | None], text: str
) -> None:
    arrays = {k: v for k, v in {**curves(2), **change}.items() if v is not None}
    with pytest.raises(RunError, match=text):
        read_relaxations(save(tmp_path / "r.npz", **arrays))


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    npz = save(tmp_path / "r.npz", **curves(2))
    npz.write_bytes(npz.read_bytes()[:100])
    with pytest.raises(RunError, match="not a readable"):
        read_relaxations(npz)
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(RunError, match="a single array"):
        read_relaxations(tmp_path / "one.npy")


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    npz = save(tmp_path / "r.npz", **curves(2))
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written"):
        plot_relaxation(npz, tmp_path / "file" / "r.png")


def test_rounding_after_the_energy_reached_its_end_is_not_drawn(tmp_path: Path) -> None:
    arrays = curves(1, steps=12)
    settled, shaky = arrays["energy"].copy(), arrays["energy"].copy()
    settled[0, 8:] = shaky[0, 8:] = -100.0
    shaky[0, 9:11] += 1e-3
    for name, energy in (("settled", settled), ("shaky", shaky)):
        npz = save(tmp_path / f"{name}.npz", **{**arrays, "energy": energy})
        plot_relaxation(npz, tmp_path / f"{name}.png")
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("settled", "shaky")]
    assert pictures[0] == pictures[1]
