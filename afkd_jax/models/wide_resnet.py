"""Wide residual networks for small images, depth 6n + 4: `wrn-16-2`, `wrn-28-10-drop0.3`.

Source: Zagoruyko and Komodakis 2016. Three stages of n pre-activated blocks with 16, 32 and 64
channels times k, after a stem of 16; the second and third stage halve height and width. Dropout,
off unless the name has it, is between a block's two convolutions. The feature map is taken after
the last norm and ReLU, so that it is activated as those of the other families (our choice).
"""

import re
from collections.abc import Callable

import flax.linen as nn
import jax

from afkd_jax.devices import xla_cpu as cpu
from afkd_jax.errors import UserError
from afkd_jax.models import names
from afkd_jax.models.layers import Conv, Dropout, Layers, Norm, relu

NAMES = tuple(
    f'wrn-{size}' for size in ('16-1', '16-2', '16-4', '28-2', '28-4', '28-10', '40-1', '40-2')
)
_NAME = re.compile(r'wrn-([1-9][0-9]{0,3})-([0-9]{1,3})(?:-drop([0-9]*\.?[0-9]+))?')


class Block(nn.Module):
    """x + F(x); F is norm, ReLU, 3x3 convolution, twice.

    Where the shape changes, x is the first ReLU's output through a 1x1 convolution.
    """

    channels: int
    stride: int
    rate: float
    conv: Conv
    norm: Norm
    dropout: Callable[[float], Dropout]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the block's output, not activated."""
        y = relu(self.norm(use_running_average=not train, name='norm1')(x))
        if x.shape[-1] != self.channels or self.stride != 1:
            x = self.conv(self.channels, (1, 1), self.stride, padding=0, name='conv_short')(y)
        y = self.conv(self.channels, (3, 3), self.stride, padding=1, name='conv1')(y)
        y = relu(self.norm(use_running_average=not train, name='norm2')(y))
        y = self.dropout(self.rate)(y, train)
        y = self.conv(self.channels, (3, 3), padding=1, name='conv2')(y)
        return cpu.kept(x + y)


class WideResNet(nn.Module):
    """The trunk of a wide residual network of depth 6 `blocks` + 4.

    Attributes:
      blocks: n, per stage.
      width: k.
      rate: of dropout, in [0, 1); 0: none.
      conv: makes a convolution without bias.
      norm: makes a batch norm from `use_running_average`.
      dropout: makes a dropout from a rate.
      stem: in words; the same for images of any size.
    """

    blocks: int
    width: int
    rate: float
    conv: Conv
    norm: Norm
    dropout: Callable[[float], Dropout]
    stem: str = 'conv 3x3'

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns the feature map, [B, H / 4, W / 4, 64 width], sizes rounded up."""
        x = self.conv(16, (3, 3), padding=1, name='conv')(images)
        for stage in range(3):
            for block in range(self.blocks):
                x = Block(
                    channels=16 * self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    rate=self.rate,
                    conv=self.conv,
                    norm=self.norm,
                    dropout=self.dropout,
                    name=f'stage{stage + 1}_block{block + 1}',
                )(x, train)
        return relu(self.norm(use_running_average=not train, name='norm')(x))


def from_name(name: str, layers: Layers, large: bool) -> WideResNet | None:
    """Returns the trunk called `name`, None where the name is of another family.

    Raises:
      UserError: the depth is not 6n + 4, the width is 0, or the rate not between 0 and 1.
    """
    match = _NAME.fullmatch(name)
    if not match:
        return None
    blocks = names.blocks(name, int(match[1]), offset=4)
    width, rate = names.at_least_1(name, 'width', int(match[2])), float(match[3] or 0)
    if match[3] and not 0 < rate < 1:
        raise UserError(
            f'config.networks: "{name}" has dropout {rate:g}; it must be above 0 and below 1'
        )
    return WideResNet(blocks, width, rate, layers.conv, layers.norm, layers.dropout)
