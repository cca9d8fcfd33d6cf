"""CIFAR's mirror and shift, against a loop over single images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from topotune.tasks import build_task
from topotune.tasks.classification import flip_and_shift


def _all_variants(image: Tensor, pad: int) -> list[Tensor]:
    """Every result that the rule allows for one image (channels, height, width)."""
    _, height, width = image.shape
    variants = []
    for mirrored in (image, image.flip(-1)):
        padded = torch.nn.functional.pad(mirrored, (pad, pad, pad, pad))
        for down in range(2 * pad + 1):
            for right in range(2 * pad + 1):
                variants.append(padded[:, down : down + height, right : right + width])
    return variants


def test_every_image_is_one_of_the_allowed_variants() -> None:
    images = torch.rand(200, 3, 6, 6)
    results = flip_and_shift(images, pad=2, generator=torch.Generator().manual_seed(3))
    for image, result in zip(images, results, strict=True):
        # The mirrored window reads the padded original from the right: the same set of variants.
        assert any(torch.equal(result, variant) for variant in _all_variants(image, 2))


def test_all_variants_occur_equally_often() -> None:
    image = torch.arange(1.0, 10.0).reshape(1, 3, 3)
    n = 3600
    generator = torch.Generator().manual_seed(0)
    results = flip_and_shift(image.expand(n, 1, 3, 3), pad=1, generator=generator)
    variants = _all_variants(image, 1)
    counts = [int((results == variant).flatten(1).all(dim=1).sum()) for variant in variants]
    assert sum(counts) == n
    # 18 variants, 200 each, standard deviation 13.7: five of them either way.
    assert 130 < min(counts) <= max(counts) < 270


def test_images_are_treated_independently_and_the_generator_decides() -> None:
    images = torch.rand(1, 3, 8, 8).expand(64, 3, 8, 8)
    one = flip_and_shift(images, 4, torch.Generator().manual_seed(1))
    again = flip_and_shift(images, 4, torch.Generator().manual_seed(1))
    other = flip_and_shift(images, 4, torch.Generator().manual_seed(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len({row.numpy().tobytes() for row in one}) > 20


@pytest.mark.parametrize("augment", [True, False])
def test_cifar_can_switch_it_off(augment: bool) -> None:
    task = build_task("cifar10", {"augment": augment})
    images = torch.rand(16, 3, 32, 32)
    result = task.augment(images, torch.Generator().manual_seed(0))
    assert result.shape == images.shape
    assert torch.equal(result, images) is not augment


def test_digits_are_never_mirrored() -> None:
    images = torch.rand(4, 1, 28, 28)
    result = build_task("mnist5k", {}).augment(images, torch.Generator())
    assert torch.equal(result, images)
