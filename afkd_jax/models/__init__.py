"""Network name -> network. Every network returns (logits, feature map).

A family is a module that registers a function (name, layers, large) -> trunk; `large`: the images
get the strided stem of the ImageNet networks. A trunk is a Flax module that maps (images, train) to
its feature map, or to a tuple of the maps of its stages, of which the last is its feature map; its
`stem`, if it has one, describes its first layers in words.
"""

from typing import Any

import flax.linen as nn
import jax

from afkd_jax.devices.arrays import at_least_float32
from afkd_jax.models import layers
from afkd_jax.models.layers import Dtype, Layers
from afkd_jax.registry import NETWORKS

# In the order in which their patterns are tried.
from afkd_jax.models import (  # isort: skip
    resnet as resnet,
    resnet_cifar as resnet_cifar,
    wide_resnet as wide_resnet,
    vgg as vgg,
    densenet as densenet,
    mobilenet_v2 as mobilenet_v2,
    shufflenet_v2 as shufflenet_v2,
)

_LARGE = 96  # the smallest side of large images; our choice


class Classifier(nn.Module):
    """C_k: mean over height and width, then one dense layer."""

    num_classes: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, maps_BxHxWxC: jax.Array) -> jax.Array:
        """Returns the logits, [B, num_classes], in at least single precision."""
        dense = nn.Dense(self.num_classes, dtype=self.dtype)
        return at_least_float32(dense(maps_BxHxWxC.mean((1, 2))))


class Network(nn.Module):
    """Feature extractor G_k and classifier C_k, with parameters {'trunk': ..., 'head': ...}."""

    trunk: nn.Module
    head: nn.Module
    stages: int = 1

    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        """Returns (logits [B, num_classes], feature map [B, h, w, c] after its activation).

        With `stages` above 1 a tuple of the maps of so many last stages stands for the feature map,
        which is its last. Images are standardised, [B, H, W, C]. With `train` norms use, and
        update, the statistics of the batch, and dropout is active.
        """
        maps = self.trunk(images, train)
        logits = self.head(layers.last(maps))
        return logits, layers.last(maps) if self.stages == 1 else maps[-self.stages :]


def build(
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    parts: Layers | None = None,
    stages: int = 1,
) -> Network:
    """Returns the network of a registered name, e.g. 'resnet20'; initialises no parameters.

    Args:
      image_shape: (H, W, C); its smaller side decides the stem.
      parts: the layers to build from; None: single precision, nothing mapped.
      stages: how many of the trunk's last stages the network returns the maps of.

    Raises:
      UserError: there is no such network.
    """
    large, parts = min(image_shape[:2]) >= _LARGE, parts or layers.layers(None)
    trunk = NETWORKS.get(name)(name, parts, large)
    return Network(trunk, Classifier(num_classes, parts.dtype), stages)
