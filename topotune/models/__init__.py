"""Plain torch modules, and the one registry that names them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from topotune.models.convnet import ConvNet
from topotune.models.mlp import MLP
from topotune.plugins import call_with_options, find_class
from topotune.tcep.network import TCEPNetwork

__all__ = ["MLP", "MODELS", "ConvNet", "TCEPNetwork", "build_model"]

MODELS: dict[str, type[nn.Module]] = {
    "convnet": ConvNet,
    "mlp": MLP,
    "tcep": TCEPNetwork,
}


def build_model(name: str, options: Mapping[str, object], **facts: object) -> nn.Module:
    """A freshly initialised model, from torch's global generator.

    Args:
        name: a key of :data:`MODELS`, or ``package.module:Class`` of an ``nn.Module``.
        options: the user's keyword arguments (``model.options`` in a search file).
        facts: what the task's data determine (``in_features``, ``in_channels``, ``image_size``,
            ``classes``); the model gets those that its constructor names, and the user may not
            set them.

    Raises:
        UnknownNameError: no such model.
        PluginError: the import path does not lead to an ``nn.Module`` class.
        ConfigError: the model does not take these options.
    """
    found = find_class("model", name, MODELS, nn.Module)
    return call_with_options(found, options, place="model", what=f"model {name!r}", facts=facts)
