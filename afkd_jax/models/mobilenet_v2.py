"""MobileNetV2: `mobilenet_v2`, and with a width multiplier `mobilenet_v2x0.5`.

Source: Sandler et al. 2018, table 2, as in torchvision (channels rounded to multiples of 8; no
dropout before the classifier, which there has 0.2). Small images: the first convolution and the
second stage keep height and width, as in the CIFAR variants in circulation. The feature map is the
last 1x1 convolution's output after its ReLU6, before pooling.
"""

import re

import flax.linen as nn
import jax

from afkd_jax.devices import xla_cpu
from afkd_jax.errors import UserError
from afkd_jax.models.layers import ConvNorm, Layers, relu6
from afkd_jax.registry import register_network

_PATTERN = r'mobilenet_v2(?:x([0-9]\.[0-9]{1,2}))?'
# Expansion, channels, blocks, stride of the first block.
_STAGES = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


def _rounded(channels: float) -> int:
    """Returns the nearest multiple of 8 that is at least 8 and not more than a tenth smaller."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class Block(nn.Module):
    """Inverted residual: 1x1 to `expansion` times the channels, 3x3 on each channel, 1x1 back."""

    channels: int
    stride: int
    expansion: int
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the block's output, not activated."""
        y, wide = x, self.expansion * x.shape[-1]
        if self.expansion != 1:
            y = relu6(ConvNorm(self.layers, wide, 1)(y, train))
        y = relu6(ConvNorm(self.layers, wide, 3, self.stride, depthwise=True)(y, train))
        y = ConvNorm(self.layers, self.channels, 1)(y, train)
        return xla_cpu.computed_once(x + y) if self.stride == 1 and x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """The trunk."""

    width: float  # multiplies every channel count but the last, which it never shrinks
    large: bool
    layers: Layers
    stem: str

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Returns the stages' maps, the last [B, H / 32, W / 32, C].

        Of small images it is / 8; sizes are rounded up.
        """
        first = ConvNorm(self.layers, _rounded(32 * self.width), 3, 2 if self.large else 1)
        x, maps = relu6(first(images, train)), []
        for stage, (expansion, channels, blocks, stride) in enumerate(_STAGES):
            if stage == 1 and not self.large:
                stride = 1
            for block in range(blocks):
                x = Block(
                    channels=_rounded(channels * self.width),
                    stride=stride if block == 0 else 1,
                    expansion=expansion,
                    layers=self.layers,
                    name=f'stage{stage + 1}_block{block + 1}',
                )(x, train)
            maps.append(x)
        last = _rounded(1280 * max(1.0, self.width))
        return *maps[:-1], relu6(ConvNorm(self.layers, last, 1)(x, train))


@register_network(
    *('mobilenet_v2', 'mobilenet_v2x0.5', 'mobilenet_v2x0.75', 'mobilenet_v2x1.4'), pattern=_PATTERN
)
def _build(name: str, layers: Layers, large: bool) -> MobileNetV2:
    [multiplier] = re.findall(_PATTERN, name)
    width = float(multiplier or 1)
    if not width:
        raise UserError(f'config.networks: "{name}" has width multiplier 0; it must be above 0')
    stem = 'conv 3x3 stride 2' if large else 'conv 3x3; second stage not strided'
    return MobileNetV2(width, large, layers, stem)
