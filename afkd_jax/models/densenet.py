"""Densely connected networks for small images: `densenet-40-12`, `densenet-100-12`.

Source: Huang et al. 2017, DenseNet-BC: depth L = 6n + 4, growth rate k; a stem of 2k channels and
three stages of n bottlenecks, each of which adds k channels to all that came before; between the
stages the channels are halved and the map is pooled to half its height and width. The feature map
is taken after the last norm and ReLU, before pooling.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from afkd_jax.models import names
from afkd_jax.models.layers import Layers, relu
from afkd_jax.registry import register_network

_PATTERN = r'densenet-([1-9][0-9]{0,3})-([0-9]{1,3})'


class DenseNet(nn.Module):
    """The trunk of a DenseNet-BC."""

    blocks: int  # n
    growth: int  # k
    layers: Layers
    stem: str = 'conv 3x3'

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Returns the stages' maps, the last [B, H / 4, W / 4, C]; sizes are rounded down."""

        def activated(x):
            return relu(self.layers.norm(use_running_average=not train)(x))

        x, maps = self.layers.conv(2 * self.growth, (3, 3), padding=1)(images), []
        for stage in range(3):
            if stage > 0:
                x = self.layers.conv(x.shape[-1] // 2, (1, 1))(activated(x))
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for _ in range(self.blocks):
                y = self.layers.conv(4 * self.growth, (1, 1))(activated(x))
                y = self.layers.conv(self.growth, (3, 3), padding=1)(activated(y))
                x = jnp.concatenate([x, y], axis=-1)
            maps.append(x)
        return *maps[:-1], activated(x)


@register_network('densenet-40-12', 'densenet-100-12', pattern=_PATTERN)
def _build(name: str, layers: Layers, large: bool) -> DenseNet:
    [(depth, growth)] = re.findall(_PATTERN, name)
    blocks = names.blocks(name, depth, offset=4)
    return DenseNet(blocks, names.at_least_1(name, 'growth rate', growth), layers)
