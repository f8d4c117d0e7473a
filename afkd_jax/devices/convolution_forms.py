"""Convolutions and their two gradients: XLA's form of each, and others that are quicker on CPUs.

Each is linear in both of its arrays: x [N, H, W, C], the kernel, and the output g [N, h, w, D].
What the CPU's forms give is measured in docs/performance.md.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from afkd_jax.devices.arrays import at_least_float32
from afkd_jax.devices.xla_cpu import computed_once


class Form(NamedTuple):
    """What a convolution is, without its arrays.

    Attributes:
      image: (H, W, C).
      kernel: (rows, columns, C / groups, D).
      strides: of both axes.
      padding: (before, after) of both axes.
      options: the other arguments of jax.lax.conv_general_dilated.
    """

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    options: tuple[tuple[str, Any], ...]


def forward(x: jax.Array, kernel: jax.Array, form: Form) -> jax.Array:
    """Returns the convolution g."""
    return jax.lax.conv_general_dilated(x, kernel, form.strides, form.padding, **dict(form.options))


def to_images(g: jax.Array, kernel: jax.Array, form: Form) -> jax.Array:
    """Returns the gradient to x."""
    return _transposed(lambda x: forward(x, kernel, form), g, (len(g), *form.image))


def to_kernel(x: jax.Array, g: jax.Array, form: Form) -> jax.Array:
    """Returns the gradient to the kernel."""
    return _transposed(lambda kernel: forward(x, kernel, form), g, form.kernel)


def _transposed(
    linear: Callable[[jax.Array], jax.Array], g: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Returns the transpose of a linear function of an array of this shape, applied to g."""
    # It varies over the mesh as g does, so there is no sum over devices.
    abstract: Any = jax.typeof(g).update(shape=shape)
    return jax.linear_transpose(linear, abstract)(g)[0]


# On CPUs.

_MANY = 256  # input channels; with fewer the gradient to small outputs is quick
_PIXELS, _PARTS = 8192, 4  # from so many pixels on, a product in parts is quicker


def to_images_cpu(g: jax.Array, kernel: jax.Array, form: Form) -> jax.Array:
    """Is to_images, of an output that is at least as large as the kernel.

    XLA:CPU computes the gradient of a smaller one one element at a time; so zeros extend it.
    """
    missing = max(form.kernel[0] - g.shape[1], form.kernel[1] - g.shape[2])
    if missing <= 0 or form.image[-1] < _MANY:
        return to_images(g, kernel, form)
    larger = tuple((before, after + max(form.strides) * missing) for before, after in form.padding)
    rows, columns = g.shape[1:3]

    def with_zeros(x: jax.Array) -> jax.Array:
        return forward(x, kernel, form._replace(padding=larger))[:, :rows, :columns]

    return _transposed(with_zeros, g, (len(g), *form.image))


def to_kernel_cpu(x: jax.Array, g: jax.Array, form: Form) -> jax.Array:
    """Is to_kernel, a matrix product for kernels of 1x1.

    For a convolution XLA:CPU transposes both arrays first.
    """
    if form.kernel[:2] == form.strides == (1, 1) and not any(map(any, form.padding)):
        return _product(x, g).reshape(form.kernel)
    return to_kernel(x, g, form)


def _product(x: jax.Array, g: jax.Array) -> jax.Array:
    """Returns the sum over all pixels of the outer products of x and g, [C, D]."""
    if x.shape[-1] > g.shape[-1]:  # Eigen is quicker with the smaller one first
        return _product(g, x).T
    pixels = math.prod(x.shape[:-1])
    parts = _PARTS if pixels >= _PIXELS and pixels % _PARTS == 0 else 1
    first, second = (at_least_float32(each).reshape(parts, -1, each.shape[-1]) for each in (x, g))
    products = jax.lax.dot_general(first, second, (((1,), (1,)), ((0,), (0,))))
    return products.sum(0).astype(x.dtype)


# Depthwise, on CPUs. XLA:CPU computes a grouped convolution one output at a time. Here each tap of
# the kernel, [S, S, 1, C], is a product with the shifted maps. Sums are in single precision or
# better.


def depthwise_cpu(x: jax.Array, kernel: jax.Array, form: Form) -> jax.Array:
    """Is forward."""
    weights, taps = at_least_float32(kernel), _shifted(at_least_float32(x), form)
    products = [weights[i : i + 1, j : j + 1] * tap for i, j, tap in taps]
    return functools.reduce(jnp.add, products).astype(x.dtype)


def depthwise_to_images_cpu(g: jax.Array, kernel: jax.Array, form: Form) -> jax.Array:
    """Is to_images."""
    precise, weights = at_least_float32(g), at_least_float32(kernel)
    to_x = _transposed(lambda x: depthwise_cpu(x, weights, form), precise, (len(g), *form.image))
    return to_x.astype(g.dtype)


def depthwise_to_kernel_cpu(x: jax.Array, g: jax.Array, form: Form) -> jax.Array:
    """Is to_kernel."""
    precise = at_least_float32(g)
    taps = [_sum(tap * precise) for _, _, tap in _shifted(at_least_float32(x), form)]
    return jnp.stack(taps).reshape(form.kernel).astype(g.dtype)


def _shifted(x: jax.Array, form: Form) -> Iterator[tuple[int, int, jax.Array]]:
    """Yields (i, j, what tap (i, j) of the kernel is multiplied with: [N, h, w, C])."""
    (down, right), (rows, columns) = form.strides, form.kernel[:2]
    pads = [(*pad, 0) for pad in ((0, 0), *form.padding, (0, 0))]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), pads)  # unlike jnp.pad also by less than 0
    height, width = x.shape[1] - rows + 1, x.shape[2] - columns + 1  # of the output of stride 1
    for i in range(rows):
        for j in range(columns):
            yield i, j, x[:, i : i + height : down, j : j + width : right]


def _sum(x: jax.Array) -> jax.Array:
    """Returns the sum over all axes but the last.

    XLA:CPU adds up the leading axes one channel after the other, against the order in memory. So
    most additions are of whole slices, element by element, and only the rest is reduced.
    """
    for _ in range(2):
        parts = math.gcd(len(x), 8)
        if parts > 1:
            x = computed_once(functools.reduce(jnp.add, jnp.split(x, parts)))
    return x.sum((0, 1, 2))
