"""The convolution, norm and dropout that are injected into every network."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from afkd_jax.devices import convolution, xla_cpu
from afkd_jax.models.norm import BatchNorm

Conv = Callable[..., nn.Module]
Norm = Callable[..., nn.Module]

Dtype = str | None  # of the computation; None: that of the parameters

# He et al. 2015; weights drawn by fan in. A norm follows every convolution, so none has a bias.
conv = functools.partial(
    nn.Conv,
    use_bias=False,
    kernel_init=nn.initializers.he_normal(),
    conv_general_dilated=convolution.conv_general_dilated,
)


def last(maps: Any) -> jax.Array:
    """Returns a network's feature map: the maps themselves, or the last of a tuple of stages."""
    return maps[-1] if isinstance(maps, tuple) else maps


class Dropout(nn.Module):
    """Zeroes each element with probability `rate` and divides the others by 1 - rate.

    The zeroed elements are a function of the step's key, the layer and the image's index in the
    global batch, so that the number of devices changes nothing.
    """

    rate: float  # in [0, 1)
    axis_name: str | None  # the mesh axis of the batch; None where nothing is mapped

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns x with elements dropped; x itself outside training."""
        if not train or not self.rate:
            return x
        device = jax.lax.axis_index(self.axis_name) if self.axis_name else 0
        index_B = device * len(x) + jnp.arange(len(x))
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng('dropout'), index_B)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys_B)
        return jnp.where(keep, x / (1 - self.rate), 0)


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers that networks, transfer layers and discriminators are built from.

    Parameters and batch statistics are in single precision, whatever the dtype.
    """

    conv: Conv  # without bias
    norm: Norm  # a function of `use_running_average`
    dropout: Callable[[float], Dropout]  # a function of the rate
    dtype: Dtype


@functools.cache  # so that equal networks are equal modules
def layers(axis_name: str | None, dtype: str = 'float32', local_statistics: bool = False) -> Layers:
    """Returns the layers for the mesh axis of the batch; None where nothing is mapped.

    Batch statistics are over the global batch or, if they are local, over each device's shard.
    """
    # None, not 'float32': then tests can run the whole computation in double precision.
    compute = None if dtype == 'float32' else dtype
    axis = None if local_statistics else axis_name
    norm = functools.partial(BatchNorm, momentum=0.9, epsilon=1e-5, axis_name=axis, dtype=compute)
    dropout = functools.partial(Dropout, axis_name=axis_name)
    return Layers(functools.partial(conv, dtype=compute), norm, dropout, compute)


def relu(x: jax.Array) -> jax.Array:
    """Returns max(x, 0)."""
    return xla_cpu.computed_once(nn.relu(x))


def relu6(x: jax.Array) -> jax.Array:
    """Returns min(max(x, 0), 6)."""
    return xla_cpu.computed_once(nn.relu6(x))


def padded_max_pool(x: jax.Array) -> jax.Array:
    """Returns the maximum over 3x3 with stride 2, padded by 1."""
    padding: Any = ((1, 1), (1, 1))  # Flax declares a str
    return nn.max_pool(x, (3, 3), (2, 2), padding)


class ConvNorm(nn.Module):
    """Convolution and norm, padded so that stride 1 keeps height and width.

    Depthwise, each channel has a kernel of its own; there are as many as the input has.
    """

    layers: Layers
    channels: int
    kernel: int
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the normalised output, not activated."""
        x = self.layers.conv(
            self.channels,
            (self.kernel, self.kernel),
            self.stride,
            padding=self.kernel // 2,
            feature_group_count=self.channels if self.depthwise else 1,
            name='conv',
        )(x)
        return self.layers.norm(use_running_average=not train, name='norm')(x)


def residual_stages(
    block: Callable[..., nn.Module], channels: int, blocks: Sequence[int], x: jax.Array, train: bool
) -> tuple[jax.Array, ...]:
    """Returns x after each stage of `blocks` blocks, the first with this number of channels.

    Every other stage doubles the channels and halves height and width in its first block.
    """
    outputs = []
    for stage, count in enumerate(blocks):
        for number in range(count):
            stride = 2 if stage > 0 and number == 0 else 1
            name = f'stage{stage + 1}_block{number + 1}'
            x = block(channels=channels * 2**stage, stride=stride, name=name)(x, train)
        outputs.append(x)
    return tuple(outputs)
