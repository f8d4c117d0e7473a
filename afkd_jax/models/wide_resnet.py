"""Wide residual networks for small images, depth 6n + 4: `wrn-16-2`, `wrn-28-10-drop0.3`.

Source: Zagoruyko and Komodakis 2016. Three stages of n pre-activated blocks with 16, 32 and 64
channels times k, after a stem of 16; the second and third stage halve height and width. Dropout,
off unless the name has it, is between a block's two convolutions. The feature map is taken after
the last norm and ReLU, so that it is activated as those of the other families (our choice).
"""

import functools
import re

import flax.linen as nn
import jax

from afkd_jax.devices import xla_cpu
from afkd_jax.errors import UserError
from afkd_jax.models import names
from afkd_jax.models.layers import Layers, relu, residual_stages
from afkd_jax.registry import register_network

_NAMES = tuple(
    f'wrn-{size}' for size in ('16-1', '16-2', '16-4', '28-2', '28-4', '28-10', '40-1', '40-2')
)
_PATTERN = r'wrn-([1-9][0-9]{0,3})-([0-9]{1,3})(?:-drop([0-9]*\.?[0-9]+))?'


class Block(nn.Module):
    """x + F(x); F is norm, ReLU, 3x3 convolution, twice.

    Where the shape changes, x is the first ReLU's output through a 1x1 convolution.
    """

    channels: int
    stride: int
    rate: float
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the block's output, not activated."""
        y = relu(self.layers.norm(use_running_average=not train, name='norm1')(x))
        if x.shape[-1] != self.channels or self.stride != 1:
            short = self.layers.conv(self.channels, (1, 1), self.stride, name='conv_short')
            x = short(y)
        y = self.layers.conv(self.channels, (3, 3), self.stride, padding=1, name='conv1')(y)
        y = relu(self.layers.norm(use_running_average=not train, name='norm2')(y))
        y = self.layers.dropout(self.rate)(y, train)
        y = self.layers.conv(self.channels, (3, 3), padding=1, name='conv2')(y)
        return xla_cpu.computed_once(x + y)


class WideResNet(nn.Module):
    """The trunk."""

    blocks: int  # n
    width: int  # k
    rate: float  # of dropout
    layers: Layers
    stem: str = 'conv 3x3'

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Returns the stages' maps, the last [B, H / 4, W / 4, 64 width], sizes rounded up."""
        x = self.layers.conv(16, (3, 3), padding=1, name='conv')(images)
        block = functools.partial(Block, rate=self.rate, layers=self.layers)
        *others, x = residual_stages(block, 16 * self.width, 3 * [self.blocks], x, train)
        x = relu(self.layers.norm(use_running_average=not train, name='norm')(x))
        return *others, x


@register_network(*_NAMES, pattern=_PATTERN)
def _build(name: str, layers: Layers, large: bool) -> WideResNet:
    [(depth, width, dropout)] = re.findall(_PATTERN, name)
    blocks, width = names.blocks(name, depth, offset=4), names.at_least_1(name, 'width', width)
    rate = float(dropout or 0)
    if dropout and not 0 < rate < 1:
        raise UserError(
            f'config.networks: "{name}" has dropout {rate:g}; it must be above 0 and below 1'
        )
    return WideResNet(blocks, width, rate, layers)
