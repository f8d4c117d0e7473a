"""Batch normalization as one product and one sum per element."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from afkd_jax.devices.arrays import at_least_float32


class BatchNorm(nn.Module):
    """flax.linen.BatchNorm over all axes but the last, with another order of operations.

    y = a x + b with a = scale / sqrt(var + epsilon) and b = bias - mean a, per channel. So the
    gradient g to y enters two sums over the images, of g and of g x, and one expression per element
    of x. Flax's y = (x - mean) a + bias has three sums, and keeps x - mean too. Computed in single
    precision or better.
    """

    use_running_average: bool
    momentum: float
    epsilon: float
    axis_name: str | None  # the mesh axis over which the statistics are; None: over this device
    dtype: str | None  # of y; None: that of x, in single precision or better

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x normalised, [..., C]."""
        kind = x.shape[-1:], jnp.float32  # as Flax's, also where doubles are enabled
        scale = self.param('scale', nn.initializers.ones, *kind)
        bias = self.param('bias', nn.initializers.zeros, *kind)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, *kind)
        running_var = self.variable('batch_stats', 'var', jnp.ones, *kind)
        dtype = self.dtype or jnp.result_type(x, scale)
        x, axes = at_least_float32(x), tuple(range(x.ndim - 1))
        mean, var = running_mean.value, running_var.value
        if not self.use_running_average:
            mean, var = self._statistics(x, axes)
            if not self.is_initializing():
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * var
        a = scale * jax.lax.rsqrt(var + self.epsilon)
        factor, shift = (jnp.expand_dims(each, axes) for each in (a, bias - mean * a))
        return (factor * x + shift).astype(dtype)

    def _statistics(self, x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        moments = jnp.stack([x.mean(axes), jnp.square(x).mean(axes)])
        if self.axis_name and not self.is_initializing():
            moments = jax.lax.pmean(moments, self.axis_name)
        mean, square = moments
        return mean, jnp.maximum(square - jnp.square(mean), 0.0)  # rounding can make it negative
