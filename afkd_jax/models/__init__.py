"""Network name -> network. Every network returns (logits, feature map).

A family is a file with NAMES (for suggestions) and from_name(name, layers, large) -> trunk, or
None where the name is of another family. A trunk maps (images, train) to its feature map, and its
`stem` says in words how it treats the image first.
"""

import flax.linen as nn
import jax

from afkd_jax.errors import UserError, nearest
from afkd_jax.models import (
    densenet,
    layers,
    mobilenet_v2,
    resnet,
    resnet_cifar,
    shufflenet_v2,
    vgg,
    wide_resnet,
)

# In the order in which they are asked: `resnet50` is the ImageNet network.
_FAMILIES = (resnet, resnet_cifar, wide_resnet, vgg, densenet, mobilenet_v2, shufflenet_v2)
NAMES = tuple(name for family in _FAMILIES for name in family.NAMES)

# From this side on, images get the strided stem of the ImageNet networks. Our choice.
_LARGE = 96


class Classifier(nn.Module):
    """C_k: mean over height and width, then one dense layer."""

    num_classes: int
    dtype: layers.Dtype = None

    @nn.compact
    def __call__(self, maps_BxHxWxC: jax.Array) -> jax.Array:
        """Returns the logits, [B, num_classes], in at least single precision."""
        dense = nn.Dense(self.num_classes, dtype=self.dtype)
        return layers.at_least_float32(dense(maps_BxHxWxC.mean((1, 2))))


class Network(nn.Module):
    """Feature extractor G_k (`trunk`) and classifier C_k (`head`).

    The parameters keep the two apart: {'trunk': ..., 'head': ...}.
    """

    trunk: nn.Module
    head: nn.Module

    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns (logits [B, num_classes], feature map [B, h, w, c] after its activation).

        Args:
          images: standardised, [B, H, W, C].
          train: whether the norms use, and update, the batch's own statistics, and dropout drops.
        """
        maps_BxHxWxC = self.trunk(images, train)
        return self.head(maps_BxHxWxC), maps_BxHxWxC


def build(
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    parts: layers.Layers | None = None,
) -> Network:
    """Returns the network called `name`; no parameters are made and no device is touched.

    Args:
      name: e.g. 'resnet20', 'wrn-16-2', 'mobilenet_v2x0.5'; NAMES lists the usual ones.
      num_classes: at least 2.
      image_shape: (H, W, C); its smaller side decides the stem.
      parts: what it is built from; None: of single precision, and nothing is mapped.

    Raises:
      UserError: no network has this name.
    """
    large, parts = min(image_shape[:2]) >= _LARGE, parts or layers.layers(None)
    for family in _FAMILIES:
        trunk = family.from_name(name, parts, large)
        if trunk is not None:
            return Network(trunk, Classifier(num_classes, parts.dtype))
    raise UserError(f'config.networks: no network is called "{name}"{nearest(name, NAMES)}')
