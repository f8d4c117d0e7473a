"""Networks that compile in no time, and the digits with them; also a config file of launch.py.

Command: python launch.py --config tests/tiny.py
"""

import re

import flax.linen as nn

from afkd_jax.models import layers as layers_lib
from afkd_jax.registry import register_network
from configs import digits

TINY = r'tiny-(\d+)-(\d)(-drop)?'
PAIR = ('tiny-8-2', 'tiny-8-2')


class Tiny(nn.Module):
    """One convolution, norm, ReLU and perhaps dropout: a trunk that compiles in no time."""

    channels: int
    stride: int
    rate: float
    layers: layers_lib.Layers
    stem: str = 'conv 3x3'

    @nn.compact
    def __call__(self, images, train):
        x = self.layers.conv(self.channels, (3, 3), self.stride, padding=1)(images)
        x = nn.relu(self.layers.norm(use_running_average=not train)(x))
        return self.layers.dropout(self.rate)(x, train)


# 'tiny-C-S': C channels, stride S; 8x8 images give maps of ceil(8 / S).
@register_network(pattern=TINY)
def _tiny(name, layers, large):
    match = re.fullmatch(TINY, name)
    return Tiny(int(match[1]), int(match[2]), 0.3 if match[3] else 0.0, layers)


def get_config(networks=','.join(PAIR)):
    return digits.get_config(networks)
