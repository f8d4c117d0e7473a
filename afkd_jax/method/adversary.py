"""The discriminator D_k, and the transfer layer T_k for maps that do not fit the shared shape."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from afkd_jax import config
from afkd_jax.devices.arrays import at_least_float32
from afkd_jax.models.layers import Layers, relu


class Discriminator(nn.Module):
    """A classifier of feature maps: 1 for the teacher's ("real"), 0 for the student's ("fake").

    Conv 3x3 stride 2 - BatchNorm - LeakyReLU 0.2 - Conv over the rest of the map, 1 channel -
    Sigmoid. The layers are remembered from the paper, not verified. Our choice, where it is
    unknown: as many channels as the map, no bias before the norm (it would cancel), He
    initialisation of the first convolution and Flax's default (LeCun) of the last. Real and fake
    maps are separate batches, each with its own batch statistics; a discriminator is only used in
    training, so it has no running statistics.

    Switches, off by default (config.Discriminator; formulas in docs/method.md). More `layers` have
    stride 1. Spectral norm is of every kernel, by one step of power iteration per training step,
    whose vectors are in batch_stats. A condition e adds mean over locations of <V e, hidden> to the
    output (projection, Miyato and Koyama 2018); 'patch' is without that mean and ends in a 1x1
    convolution; 'pooled' has 1x1 layers on the mean over locations.
    """

    layers: Layers
    settings: config.Discriminator = config.Discriminator()
    classes: int = 0  # entries of a condition

    @property
    def has_state(self) -> bool:
        """Whether it has batch_stats that last from step to step."""
        return self.settings.norm == 'spectral'

    @nn.compact
    def __call__(
        self, maps_BxHxWxC: jax.Array, condition_BxE: jax.Array | None = None
    ) -> jax.Array:
        """Returns one number per map, [B], of 'patch' per location, [B, h, w].

        It is in (0, 1) with the loss 'lsgan', else of any size.
        """
        own, dtype = self.settings, self.layers.dtype
        normed = own.norm in ('batch', 'joint')

        def apply(layer: nn.Module, x: jax.Array) -> jax.Array:
            if own.norm == 'spectral':
                return nn.SpectralNorm(layer, dtype=dtype)(x, update_stats=True)
            return layer(x)

        x, kernel, stride, padding = maps_BxHxWxC, (3, 3), 2, 1
        if own.input == 'pooled':
            x, kernel, stride, padding = x.mean((1, 2), keepdims=True), (1, 1), 1, 0
        width = own.width or x.shape[-1]
        for _ in range(own.layers):
            conv = self.layers.conv(width, kernel, stride, padding=padding, use_bias=not normed)
            x, stride = apply(conv, x), 1
            if normed:
                x = self.layers.norm(use_running_average=False)(x)
            x = nn.leaky_relu(x, 0.2)
        rest = (1, 1) if own.input == 'patch' else x.shape[1:3]
        d_BxHxW = apply(nn.Conv(1, rest, padding='VALID', dtype=dtype), x)[..., 0]
        if condition_BxE is not None:
            embedding = nn.Dense(width, use_bias=False, dtype=dtype, name='projection')
            inner_BxHxW = jnp.einsum('bhwc,bc->bhw', x, apply(embedding, condition_BxE))
            if own.input != 'patch':
                inner_BxHxW = inner_BxHxW.mean((1, 2), keepdims=True)
            d_BxHxW += inner_BxHxW
        d = at_least_float32(d_BxHxW if own.input == 'patch' else d_BxHxW[:, 0, 0])
        return nn.sigmoid(d) if own.loss == 'lsgan' else d


class Transfer(nn.Module):
    """T_k: brings a network's map to the shape shared by the cohort.

    Average pooling where height or width differ, then Conv 1x1 - BatchNorm - ReLU where the
    channels do. It is built only where the map does not fit. Source: a third party for its role;
    the layers are remembered; pooling, and pooling first, is our choice.

    Attributes:
      shape: (h, w, c), the smallest height and width and the largest channel count of the cohort.
    """

    shape: tuple[int, int, int]
    layers: Layers

    @nn.compact
    def __call__(self, maps_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        """Returns the map in the shared shape, [B, h, w, c]."""
        x = average_pool(maps_BxHxWxC, self.shape[:2])
        if x.shape[-1] == self.shape[-1]:
            return x
        x = self.layers.conv(self.shape[-1], (1, 1))(x)
        return relu(self.layers.norm(use_running_average=not train)(x))


class StageTransfer(nn.Module):
    """The transfer layers of the maps of several stages; None where a map fits."""

    stages: tuple[Transfer | None, ...]

    @nn.compact
    def __call__(self, maps: tuple[jax.Array, ...], train: bool) -> tuple[jax.Array, ...]:
        """Returns each map in the shape that its stage shares."""
        pairs = zip(self.stages, maps, strict=True)
        return tuple(layer(own, train) if layer else own for layer, own in pairs)


def average_pool(maps_BxHxWxC: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Returns the maps averaged to a smaller height and width, [B, h, w, C].

    Row i of h <= H is the mean of rows floor(i H / h) .. ceil((i + 1) H / h) - 1, and likewise for
    columns ("adaptive" pooling): plain blocks where h divides H, else blocks that overlap.
    """
    for axis, size in zip((1, 2), shape, strict=True):
        if maps_BxHxWxC.shape[axis] != size:
            own = at_least_float32(maps_BxHxWxC)  # bfloat16 cannot represent 1/3
            weights = _pooling_matrix(own.shape[axis], size).astype(own.dtype)
            pooled = jnp.tensordot(own, weights, axes=(axis, 1)).astype(maps_BxHxWxC.dtype)
            maps_BxHxWxC = jnp.moveaxis(pooled, -1, axis)
    return maps_BxHxWxC


def _pooling_matrix(size: int, smaller: int) -> np.ndarray:
    weights = np.zeros((smaller, size))
    for i in range(smaller):
        first, last = i * size // smaller, -(-(i + 1) * size // smaller)
        weights[i, first:last] = 1 / (last - first)
    return weights
