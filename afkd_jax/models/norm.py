"""Batch normalization as one product and one sum per element."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from afkd_jax.devices.arrays import at_least_float32


class BatchNorm(nn.BatchNorm):
    """flax.linen.BatchNorm over all axes but the last, with another order of operations.

    y = a x + b with a = scale / sqrt(var + epsilon) and b = bias - mean a, per channel. So the
    gradient g to y enters two sums over the images, of g and of g x, and one expression per element
    of x. Flax's y = (x - mean) a + bias has three sums, and keeps x - mean too. Computed in single
    precision or better. With options that change the axes or the statistics it is Flax's.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None
    ) -> jax.Array:
        """Returns x normalised, [..., C]."""
        usual = self.axis == -1 and self.use_fast_variance and self.force_float32_reductions
        if not usual or self.axis_index_groups or mask is not None:
            return super().__call__(x, use_running_average, mask=mask)
        use_running_average = nn.merge_param(
            'use_running_average', self.use_running_average, use_running_average
        )
        shape = x.shape[-1:]
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, jnp.float32)
        running_var = self.variable('batch_stats', 'var', jnp.ones, shape, jnp.float32)
        scale, bias = 1.0, 0.0
        if self.use_scale:
            scale = self.param('scale', self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = self.param('bias', self.bias_init, shape, self.param_dtype)
        dtype = self.dtype or jnp.result_type(x, scale, bias)
        x, axes = at_least_float32(x), tuple(range(x.ndim - 1))
        mean, var = running_mean.value, running_var.value
        if not use_running_average:
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
