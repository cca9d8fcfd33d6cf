"""What a search file may say and probably does not mean: each a line for a person."""

from __future__ import annotations

from collections.abc import Iterator

from topotune.config.models import SearchConfig
from topotune.config.rules import active_part, grid_size, same, unreached_ends


def remarks(config: SearchConfig) -> list[str]:
    """All that is odd about a search and allowed."""
    return [
        *_repeated_points(config),
        *_idle_gpus(config),
        *_small_grid(config),
        *unreached_ends(config),
    ]


def _repeated_points(config: SearchConfig) -> Iterator[str]:
    """A repeat may be meant, for its other seed; mostly it is a slip."""
    points = [active_part(config.space, point) for point in config.warm_start]
    for later, point in enumerate(points):
        for earlier, other in enumerate(points[:later]):
            if point.keys() == other.keys() and all(same(point[k], other[k]) for k in point):
                yield (
                    f"warm_start[{later}] is the same point as warm_start[{earlier}]: it is "
                    "trained twice, with different seeds. Remove one if that is not meant"
                )
                break


def _idle_gpus(config: SearchConfig) -> Iterator[str]:
    gpus = config.resources.gpus
    if gpus != "auto" and gpus > 1:
        yield (
            f"resources.gpus: each trial holds {gpus:g} GPUs and the training loop uses the first "
            "alone; the others stand idle unless code of your own uses them. Write gpus: 1"
        )


def _small_grid(config: SearchConfig) -> Iterator[str]:
    trials = config.budget.trials
    if config.sampler.name != "grid" or trials is None:
        return
    points = grid_size(config.space)
    if points < trials:
        yield f"budget.trials: the grid has {points} points, so that the search ends after {points}"
    elif points > trials:
        yield (
            f"budget.trials: {trials} of the grid's {points} points are tried, chosen by the seed; "
            "'topotune extend' adds others"
        )
