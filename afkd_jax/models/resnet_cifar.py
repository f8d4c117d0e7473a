"""Residual networks for small images, depth 6n + 2: `resnet20`, `resnet20x2`, `resnet20-A`.

Source: He et al. 2016, "Deep residual learning", section 4.2. Three stages of n blocks with
16, 32 and 64 channels (times the width multiplier, which widens the stem too: our choice); the
second and third stage halve height and width. The feature map is the last block's output after
its ReLU, before pooling. A depth that ImageNet's networks (resnet.py) have too is of this family
only with its shortcut named: `resnet50-B`.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from afkd_jax.errors import UserError
from afkd_jax.models import names
from afkd_jax.models.layers import Layers, relu, residual_stages
from afkd_jax.registry import register_network

_NAMES = tuple(f'resnet{depth}' for depth in (8, 14, 20, 26, 32, 38, 44, 56, 110))
_PATTERN = r'resnet([1-9][0-9]{0,3})(?:x([0-9]{1,2}))?(?:-(A|B))?'
_IMAGENET_DEPTHS = (50, 152, 200)  # of the form 6n + 2


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: x + F(x), then ReLU."""

    channels: int
    stride: int
    shortcut: str
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the block's output after its ReLU."""
        y = self.layers.conv(self.channels, (3, 3), self.stride, padding=1, name='conv1')(x)
        y = relu(self.layers.norm(use_running_average=not train, name='norm1')(y))
        y = self.layers.conv(self.channels, (3, 3), padding=1, name='conv2')(y)
        y = self.layers.norm(use_running_average=not train, name='norm2')(y)
        if x.shape != y.shape:
            if self.shortcut == 'A':
                more = self.channels - x.shape[-1]
                x = jnp.pad(
                    x[:, :: self.stride, :: self.stride],
                    ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)),
                )
            else:
                short = self.layers.conv(self.channels, (1, 1), self.stride, name='conv_short')
                x = self.layers.norm(use_running_average=not train, name='norm_short')(short(x))
        return relu(x + y)


class ResNetCifar(nn.Module):
    """The trunk.

    Attributes:
      shortcut: where a stage changes the shape: 'A' subsamples and pads channels with zeros (no
        parameters), 'B' is a 1x1 convolution with norm.
    """

    blocks: int  # n
    width: int
    shortcut: str
    layers: Layers
    stem: str = 'conv 3x3'

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Returns the stages' maps, the last [B, H / 4, W / 4, 64 width], sizes rounded up."""
        x = self.layers.conv(16 * self.width, (3, 3), padding=1, name='conv')(images)
        x = relu(self.layers.norm(use_running_average=not train, name='norm')(x))
        block = functools.partial(Block, shortcut=self.shortcut, layers=self.layers)
        return residual_stages(block, 16 * self.width, 3 * [self.blocks], x, train)


@register_network(*_NAMES, pattern=_PATTERN)
def _build(name: str, layers: Layers, large: bool) -> ResNetCifar:
    [(depth, width, shortcut)] = re.findall(_PATTERN, name)
    blocks = names.blocks(name, depth, offset=2)
    if int(depth) in _IMAGENET_DEPTHS and not shortcut:
        raise UserError(
            f'config.networks: "{name}" is not known; if you mean the network for small images of '
            f'this depth, name its shortcut: "{name}-B" or "{name}-A"'
        )
    width = names.at_least_1(name, 'width multiplier', width or '1')
    return ResNetCifar(blocks, width, shortcut or 'B', layers)
