"""Networks that compile in no time, and the digits with them: a config file of launch.py too.

Command: python launch.py --config tests/tiny.py
With LOST_AFTER_S in the environment, a lost process is noticed after so many seconds.
"""

import os
import re

import flax.linen as nn

from afkd_jax.devices import processes
from afkd_jax.models import layers as layers_lib
from afkd_jax.registry import register_network
from configs import digits

processes.LOST_AFTER_S = int(os.environ.get('LOST_AFTER_S', processes.LOST_AFTER_S))

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


class Staged(nn.Module):
    """Two convolutions with norm and ReLU, each a stage."""

    channels: int
    layers: layers_lib.Layers

    @nn.compact
    def __call__(self, images, train):
        x, maps = images, []
        for stage in (1, 2):
            x = self.layers.conv(stage * self.channels, (3, 3), 2, padding=1)(x)
            x = nn.relu(self.layers.norm(use_running_average=not train)(x))
            maps.append(x)
        return tuple(maps)


# 'staged-C': 8x8 images give maps of 4x4xC and 2x2x2C.
@register_network(pattern=r'staged-(\d+)')
def _staged(name, layers, large):
    return Staged(int(name.removeprefix('staged-')), layers)


class Convs(nn.Module):
    """Three convolutions, each with a norm and a ReLU: learns the digits in a few epochs."""

    layers: layers_lib.Layers

    @nn.compact
    def __call__(self, images, train):
        x = images
        for channels, stride in ((32, 1), (64, 2), (128, 2)):
            x = self.layers.conv(channels, (3, 3), stride, padding=1)(x)
            x = nn.relu(self.layers.norm(use_running_average=not train)(x))
        return x


@register_network(pattern='convs')
def _convs(name, layers, large):
    return Convs(layers)


def get_config(networks='tiny-8-2,tiny-8-2'):
    return digits.get_config(networks)
