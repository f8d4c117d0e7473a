"""A network, a logit teacher, a loss between maps, images and a tracker of your own, in one config.

Command: python launch.py --config examples/own_parts.py

docs/extending.md explains each part. Nothing in the package changes: the decorators register each
part under the name by which the config selects it.
"""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import afkd_jax
from afkd_jax import Config, Images, Source, default_config
from afkd_jax.method.ring import Ring
from afkd_jax.models.layers import Layers
from afkd_jax.report.trackers import EpochEnd, Event, Start, Tracker


class Plain(nn.Module):
    """The trunk: two 3x3 convolutions, each with a norm and a ReLU; the second halves the size."""

    layers: Layers

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns the feature map after its activation, [B, H / 2, W / 2, 32]."""
        x = images
        for channels, stride in ((16, 1), (32, 2)):
            x = self.layers.conv(channels, (3, 3), stride, padding=1)(x)
            x = nn.relu(self.layers.norm(use_running_average=not train)(x))
        return x


@afkd_jax.register_network('plain')
def plain(name: str, layers: Layers, large: bool) -> nn.Module:
    """Returns the trunk; `large` is whether the images have sides of at least 96 pixels."""
    return Plain(layers)


@afkd_jax.register_logit_teacher('mean')
def mean(ring: Ring, logits: jax.Array, labels: jax.Array) -> list[jax.Array]:
    """Returns one teacher for all networks, their mean: [K, B, C], [B] -> list of [K, B, C]."""
    return [jnp.broadcast_to(logits.mean(0, keepdims=True), logits.shape)]


@afkd_jax.register_map_loss('cosine')
def cosine(maps: jax.Array, teacher_maps: jax.Array) -> jax.Array:
    """Returns 1 - cosine similarity of whole maps: [..., B, H, W, C] twice -> [..., B]."""
    axes = (-3, -2, -1)
    product = jnp.sum(maps * teacher_maps, axes)
    squares = jnp.sum(maps**2, axes) * jnp.sum(teacher_maps**2, axes)
    return 1 - product * jax.lax.rsqrt(squares + 1e-6)


@afkd_jax.register_source('stripes:')
def stripes(config: Config, argument: str) -> Source:
    """Returns noisy images of horizontal, vertical and diagonal stripes; `argument` is the side."""
    side, rng = int(argument), np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    patterns = np.stack([rows, columns, rows + columns]) // 2 % 2  # [class, H, W] of 0 and 1

    def draw(count: int) -> Images:
        labels = rng.integers(0, len(patterns), count).astype(np.int32)
        noise = rng.normal(0, 60, (count, side, side))
        pixels = np.clip(60 + 120 * patterns[labels] + noise, 0, 255).astype(np.uint8)
        return Images(pixels[..., None], labels)

    classes = ('horizontal', 'vertical', 'diagonal')
    return Source(train=draw(600), test=draw(150), classes=classes)


@afkd_jax.register_tracker('csv')
class Csv(Tracker):
    """Writes losses.csv into the run directory: a line per epoch with each network's loss."""

    def __init__(self, config: Config, workdir: pathlib.Path):
        super().__init__()
        self._path = workdir / 'losses.csv'

    def handle(self, event: Event) -> None:
        """Takes every event of the run, and ignores most."""
        match event:
            case Start(names=names):
                self._header = ','.join(['epoch', 'images_per_s', *names])
            case EpochEnd(epoch=epoch, means=means, images_per_s=speed):
                row = ','.join(map(str, [epoch, speed, *means['cross_entropy']]))
                there = self._path.read_text().splitlines() if self._path.exists() else []
                # A run that resumes from an earlier checkpoint repeats the later epochs.
                lines = [self._header, *there[1:epoch], row]
                self._path.write_text('\n'.join(lines) + '\n')


def get_config(networks: str = 'plain,resnet8') -> ConfigDict:
    """Returns the config of the example."""
    config = default_config(networks)
    config.dataset = 'stripes:16'
    config.method = 'mean+cosine'
    config.loss.map_weight = 0.1
    config.epochs = 5
    config.batch_size = 50
    config.data.pad = 0
    config.data.flip = False
    config.logit.schedule = 'cosine'
    config.log_every = 6
    config.trackers = ('csv',)
    return config
