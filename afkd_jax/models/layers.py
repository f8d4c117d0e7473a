"""The convolution, norm and dropout that are injected into every network."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

Conv = Callable[..., nn.Module]
Norm = Callable[..., nn.Module]

# He et al. 2015; weights drawn by fan in. A norm follows every convolution, so none has a bias.
conv = functools.partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())


def batch_norm(axis_name: str | None) -> Norm:
    """Returns a batch norm whose statistics are over the global batch.

    Args:
      axis_name: the mapped axis of the devices; None where nothing is mapped.
    """
    return functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5, axis_name=axis_name)


class Dropout(nn.Module):
    """Zeroes each element with probability `rate` and divides the others by 1 - rate.

    What is zeroed in an image is a function of the step's key, the layer and the image's place in
    the global batch, so that the number of devices changes nothing.

    Attributes:
      rate: in [0, 1); 0 leaves everything as it is.
      axis_name: the mapped axis of the devices; None where nothing is mapped.
    """

    rate: float
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns x with elements dropped; x itself outside training."""
        if not train or not self.rate:
            return x
        device = jax.lax.axis_index(self.axis_name) if self.axis_name else 0
        place_B = device * len(x) + jnp.arange(len(x))
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng('dropout'), place_B)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys_B)
        return jnp.where(keep, x / (1 - self.rate), 0)


@dataclasses.dataclass(frozen=True)
class Layers:
    """What a family builds its networks from.

    Attributes:
      conv: makes a convolution without bias.
      norm: makes a batch norm from `use_running_average`.
      dropout: makes a dropout from a rate.
    """

    conv: Conv
    norm: Norm
    dropout: Callable[[float], Dropout]


@functools.cache  # so that equal networks are equal modules
def layers(axis_name: str | None) -> Layers:
    """Returns the layers for a mapped axis, None where nothing is mapped."""
    return Layers(conv, batch_norm(axis_name), functools.partial(Dropout, axis_name=axis_name))


class ConvNorm(nn.Module):
    """Convolution and norm, padded so that stride 1 keeps height and width."""

    channels: int
    kernel: int
    conv: Conv
    norm: Norm
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the normed output, not activated."""
        x = self.conv(
            self.channels,
            (self.kernel, self.kernel),
            self.stride,
            padding=self.kernel // 2,
            feature_group_count=self.groups,
            name='conv',
        )(x)
        return self.norm(use_running_average=not train, name='norm')(x)
