"""ShuffleNetV2: `shufflenet_v2`, and `shufflenet_v2x0.5`, `shufflenet_v2x1.5`, `shufflenet_v2x2.0`.

Source: Ma et al. 2018, table 5, as in torchvision. Three stages of 4, 8 and 4 units, the first of
each halves height and width. Large images pass a strided convolution and a max pool first, small
ones the convolution alone, not strided, as in the CIFAR variants in circulation. The feature map
is the last 1x1 convolution's output after its ReLU, before pooling.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from afkd_jax.models.layers import ConvNorm, Layers, padded_max_pool, relu
from afkd_jax.registry import register_network

# Channels of the three stages and of the map.
_NETWORKS = {
    'shufflenet_v2': (116, 232, 464, 1024),
    'shufflenet_v2x0.5': (48, 96, 192, 1024),
    'shufflenet_v2x1.5': (176, 352, 704, 1024),
    'shufflenet_v2x2.0': (244, 488, 976, 2048),
}


class Unit(nn.Module):
    """Two branches, concatenated, and their channels interleaved ("shuffled").

    The first unit of a stage sends its whole input through both branches, strided; every other
    unit sends half of the channels through one branch and leaves the other half as it is.
    """

    channels: int
    first: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the unit's output, [B, h, w, channels]."""
        half, stride = self.channels // 2, 2 if self.first else 1

        def pointwise(x):
            return relu(ConvNorm(self.layers, half, 1)(x, train))

        def depthwise(x):
            return ConvNorm(self.layers, x.shape[-1], 3, stride, depthwise=True)(x, train)

        if self.first:
            left, right = pointwise(depthwise(x)), x
        else:
            left, right = jnp.split(x, 2, axis=-1)
        right = pointwise(depthwise(pointwise(right)))
        return jnp.stack([left, right], axis=-1).reshape(*left.shape[:-1], self.channels)


class ShuffleNetV2(nn.Module):
    """The trunk."""

    channels: tuple[int, ...]  # of the three stages and of the map
    large: bool
    layers: Layers
    stem: str

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Returns the stages' maps, the last [B, H / 32, W / 32, C].

        Of small images it is / 8; sizes are rounded up.
        """
        x = relu(ConvNorm(self.layers, 24, 3, 2 if self.large else 1)(images, train))
        if self.large:
            x = padded_max_pool(x)
        maps = []
        for stage, units in enumerate((4, 8, 4)):
            for unit in range(units):
                name = f'stage{stage + 1}_unit{unit + 1}'
                x = Unit(self.channels[stage], unit == 0, self.layers, name=name)(x, train)
            maps.append(x)
        return *maps[:-1], relu(ConvNorm(self.layers, self.channels[3], 1)(x, train))


@register_network(*_NETWORKS)
def _build(name: str, layers: Layers, large: bool) -> ShuffleNetV2:
    stem = 'conv 3x3 stride 2, max pool 3x3 stride 2' if large else 'conv 3x3'
    return ShuffleNetV2(_NETWORKS[name], large, layers, stem)
