"""Models: shapes, sizes, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from topotune.errors import ConfigError, PluginError, UnknownNameError
from topotune.models import MLP, ConvNet, build_model


def test_mlp_is_a_two_layer_network_by_default() -> None:
    model = MLP(784, hidden=128)
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes == [(128, 784), (128,), (10, 128), (10,)]
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_mlp_depth_counts_hidden_layers() -> None:
    linear = [m for m in MLP(4, hidden=5, classes=3, depth=3).modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(4, 5), (5, 5), (5, 5), (5, 3)]


def test_mlp_computes_what_its_layers_say() -> None:
    model = MLP(4, hidden=6, classes=2)
    first, first_bias, second, second_bias = model.parameters()
    inputs = torch.randn(7, 2, 2)
    hidden = (inputs.reshape(7, 4) @ first.T + first_bias).clamp(min=0)
    expected = hidden @ second.T + second_bias
    assert torch.allclose(model(inputs), expected, atol=1e-6)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (2, 4), (1, 30)])
def test_convnet_takes_square_images(channels: int, size: int) -> None:
    model = ConvNet(channels, classes=7, width=4, image_size=size)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)


def test_convnet_size_at_the_paper_scale() -> None:
    # 4 convolutions, then 64 channels of 8x8 into 256 and 10.
    convolutions = (3 * 32 + 32 * 32 + 32 * 64 + 64 * 64) * 9 + 32 + 32 + 64 + 64
    dense = 64 * 8 * 8 * 256 + 256 + 256 * 10 + 10
    assert sum(p.numel() for p in ConvNet(3).parameters()) == convolutions + dense


@pytest.mark.parametrize(
    ("name", "options", "place", "words"),
    [
        ("mlp", {"hidden": 0}, "model.hidden", "at least 1 (got 0)"),
        ("mlp", {"hidden": 12.5}, "model.hidden", "whole number"),
        ("mlp", {"depth": True}, "model.depth", "got True"),
        ("mlp", {"hiden": 12}, "model.hiden", "did you mean 'hidden'?"),
        ("mlp", {"classes": 3}, "model.classes", "the data determine"),
        ("convnet", {"width": -1}, "model.width", "at least 1 (got -1)"),
        ("convnet", {"hidden": 8}, "model.hidden", "known: width"),
    ],
)
def test_bad_model_options(name: str, options: dict[str, object], place: str, words: str) -> None:
    facts = {"in_features": 16, "in_channels": 1, "image_size": 4, "classes": 2}
    with pytest.raises(ConfigError) as caught:
        build_model(name, options, **facts)
    assert caught.value.place == place
    assert words in str(caught.value)


def test_small_images_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.image_size: must be at least 4 \(got 3\)"):
        ConvNet(1, image_size=3)


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'convnet'"):
        build_model("convnets", {})


def test_model_by_import_path_gets_the_facts_it_names() -> None:
    model = build_model("torch.nn:Flatten", {"start_dim": 2}, in_features=5, classes=2)
    assert isinstance(model, nn.Flatten)
    assert model.start_dim == 2


def test_model_by_import_path_must_be_a_module() -> None:
    with pytest.raises(PluginError, match="Module"):
        build_model("collections:OrderedDict", {})


def test_a_missing_option_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^model\.out_features: "):
        build_model("torch.nn:Linear", {}, in_features=5)


def test_a_rejected_value_keeps_its_cause() -> None:
    with pytest.raises(ConfigError, match="in_channels must be divisible by groups") as caught:
        build_model(
            "torch.nn:Conv2d", {"out_channels": 4, "kernel_size": 3, "groups": 2}, in_channels=3
        )
    assert isinstance(caught.value.__cause__, ValueError)
