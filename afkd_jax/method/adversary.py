"""The discriminator D_k, and the transfer layer T_k for maps that do not fit the shared shape."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from afkd_jax.models.layers import Layers, at_least_float32, relu


class Discriminator(nn.Module):
    """A classifier of feature maps: 1 for the teacher's ("real"), 0 for the student's ("fake").

    Conv 3x3 stride 2 - BatchNorm - LeakyReLU 0.2 - Conv over the rest of the map, 1 channel -
    Sigmoid. The layers are remembered from the paper, not verified. Our choice, where it is
    unknown: as many channels as the map, no bias before the norm (it would cancel), He
    initialisation of the first convolution and Flax's default (LeCun) of the last. Real and fake
    maps are separate batches, each with its own batch statistics; a discriminator is only used in
    training, so it has no running statistics.
    """

    layers: Layers

    @nn.compact
    def __call__(self, maps_BxHxWxC: jax.Array) -> jax.Array:
        """Returns one number in (0, 1) per map: [B]."""
        channels = maps_BxHxWxC.shape[-1]
        x = self.layers.conv(channels, (3, 3), 2, padding=1)(maps_BxHxWxC)
        x = nn.leaky_relu(self.layers.norm(use_running_average=False)(x), 0.2)
        x = nn.Conv(1, x.shape[1:3], padding='VALID', dtype=self.layers.dtype)(x)
        return nn.sigmoid(at_least_float32(x[:, 0, 0, 0]))


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
