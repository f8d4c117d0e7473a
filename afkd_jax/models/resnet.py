"""Residual networks of ImageNet: `resnet18`, `resnet34`, `resnet50`, `resnet101`, `resnet152`.

Source: He et al. 2016, "Deep residual learning", table 1; a bottleneck's stride is at its 3x3
convolution, as in torchvision. Four stages with 64, 128, 256 and 512 channels (bottlenecks: four
times as many); all but the first halve height and width. Large images pass a 7x7 convolution of
stride 2 and a max pool first, small ones a 3x3 convolution. The feature map is the last block's
output after its ReLU, before pooling.
"""

import functools

import flax.linen as nn
import jax

from afkd_jax.models.layers import ConvNorm, Layers, padded_max_pool, relu, residual_stages
from afkd_jax.registry import register_network

# Blocks per stage, and whether they are bottlenecks.
_NETWORKS = {
    'resnet18': ((2, 2, 2, 2), False),
    'resnet34': ((3, 4, 6, 3), False),
    'resnet50': ((3, 4, 6, 3), True),
    'resnet101': ((3, 4, 23, 3), True),
    'resnet152': ((3, 8, 36, 3), True),
}


class Block(nn.Module):
    """x + F(x), then ReLU; F is two 3x3 convolutions, or 1x1, 3x3, 1x1 ("bottleneck")."""

    channels: int
    stride: int
    bottleneck: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the block's output after its ReLU."""

        def layer(channels, kernel, stride=1, name=None):
            return ConvNorm(self.layers, channels, kernel, stride, name=name)

        if self.bottleneck:
            y = relu(layer(self.channels, 1)(x, train))
            y = relu(layer(self.channels, 3, self.stride)(y, train))
            y = layer(4 * self.channels, 1)(y, train)
        else:
            y = relu(layer(self.channels, 3, self.stride)(x, train))
            y = layer(self.channels, 3)(y, train)
        if x.shape != y.shape:
            x = layer(y.shape[-1], 1, self.stride, name='short')(x, train)
        return relu(x + y)


class ResNet(nn.Module):
    """The trunk."""

    blocks: tuple[int, ...]  # per stage
    bottleneck: bool
    large: bool
    layers: Layers
    stem: str

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Returns the stages' maps, the last [B, H / 32, W / 32, C].

        Of small images it is / 8; sizes are rounded up.
        """
        kernel, stride = (7, 2) if self.large else (3, 1)
        x = relu(ConvNorm(self.layers, 64, kernel, stride)(images, train))
        if self.large:
            x = padded_max_pool(x)
        block = functools.partial(Block, bottleneck=self.bottleneck, layers=self.layers)
        return residual_stages(block, 64, self.blocks, x, train)


@register_network(*_NETWORKS)
def _build(name: str, layers: Layers, large: bool) -> ResNet:
    stem = 'conv 7x7 stride 2, max pool 3x3 stride 2' if large else 'conv 3x3'
    return ResNet(*_NETWORKS[name], large, layers, stem)
