"""Depthwise convolution, with a form of its own on CPUs; programs for GPUs and TPUs have XLA's.

XLA:CPU computes a grouped convolution one output at a time. On CPUs each tap of the kernel becomes
a product with the shifted maps instead. What that gives is measured in docs/performance.md.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from afkd_jax.devices.xla_cpu import computed_once, transposed


def convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Returns the convolution of each channel, [N, h, w, C], padded by half the kernel.

    Args:
      x: [N, H, W, C].
      kernel: [S, S, 1, C]; S is odd.
      stride: of both axes.
    """
    sizes = {'stride': stride, 'side': x.shape[1:3], 'size': len(kernel)}
    return computed_once(_forward.bind(x, kernel, **sizes))  # each tap would compute its gradient


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **_: Any
) -> jax.Array:
    """Is `convolution`, as flax.linen.Conv calls its `conv_general_dilated`."""
    assert set(padding) == {(len(kernel) // 2,) * 2}
    return convolution(x, kernel, strides[0])


# Each of the three is linear in both arguments, and its transposes are the other two. `side` is
# the height and width of x, and `size` that of the kernel.


def _convolved(x: jax.Array, kernel: jax.Array, stride: int, side: Any, size: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(size // 2, size // 2)] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1],
    )


def _to_images(g: jax.Array, kernel: jax.Array, stride: int, side: Any, size: int) -> jax.Array:
    def forward(x: jax.Array) -> jax.Array:
        return _convolved(x, kernel, stride, side, size)

    return transposed(forward, g, (len(g), *side, g.shape[-1]))


def _to_kernel(x: jax.Array, g: jax.Array, stride: int, side: Any, size: int) -> jax.Array:
    def forward(kernel: jax.Array) -> jax.Array:
        return _convolved(x, kernel, stride, side, size)

    return transposed(forward, g, (size, size, 1, g.shape[-1]))


# On CPUs. Sums are in single precision or better.


def _precise(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _shifted(x: jax.Array, stride: int, size: int) -> Iterator[tuple[int, int, jax.Array]]:
    """Yields (i, j, what tap (i, j) of the kernel is multiplied with: [N, h, w, C])."""
    pad = (size // 2, size // 2)
    last = [stride * ((side - 1) // stride) + 1 for side in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    for i in range(size):
        for j in range(size):
            yield i, j, x[:, i : i + last[0] : stride, j : j + last[1] : stride]


def _convolved_cpu(x: jax.Array, kernel: jax.Array, stride: int, side: Any, size: int) -> jax.Array:
    weights = _precise(kernel)
    shifted = _shifted(_precise(x), stride, size)
    taps = [weights[i : i + 1, j : j + 1] * tap for i, j, tap in shifted]
    return functools.reduce(jnp.add, taps).astype(x.dtype)


def _to_images_cpu(g: jax.Array, kernel: jax.Array, stride: int, side: Any, size: int) -> jax.Array:
    weights = _precise(kernel)

    def forward(x: jax.Array) -> jax.Array:
        return _convolved_cpu(x, weights, stride, side, size)

    return transposed(forward, _precise(g), (len(g), *side, g.shape[-1])).astype(g.dtype)


def _to_kernel_cpu(x: jax.Array, g: jax.Array, stride: int, side: Any, size: int) -> jax.Array:
    cotangent = _precise(g)
    taps = [_sum(tap * cotangent) for _, _, tap in _shifted(_precise(x), stride, size)]
    return jnp.stack(taps).reshape(size, size, 1, -1).astype(g.dtype)


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


def _primitive(name: str, default: Callable[..., Any], cpu: Callable[..., Any]) -> Primitive:
    """Returns a primitive of two arrays with channels last, which is `cpu` on CPUs."""
    primitive = Primitive(name)
    primitive.def_impl(lambda a, b, **sizes: jax.jit(functools.partial(default, **sizes))(a, b))

    def abstract(a: Any, b: Any, **sizes: Any) -> Any:
        like = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (a, b)]
        out = jax.eval_shape(functools.partial(default, **sizes), *like)
        return a.update(shape=out.shape, dtype=out.dtype)  # it varies over the mesh as `a` does

    def batched(arrays: Any, axes: Any, **sizes: Any) -> tuple[jax.Array, int]:
        """Appends the mapped axis to the channels."""
        (count,) = {x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None}
        merged = []
        for x, axis in zip(arrays, axes, strict=True):
            x = jnp.stack([x] * count, -2) if axis is None else jnp.moveaxis(x, axis, -2)
            merged.append(x.reshape(*x.shape[:-2], -1))
        out = primitive.bind(*merged, **sizes)
        return out.reshape(*out.shape[:-1], count, -1), out.ndim - 1

    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(default, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(cpu, multiple_results=False), platform='cpu')
    return primitive


_forward = _primitive('depthwise', _convolved, _convolved_cpu)
_images = _primitive('depthwise_to_images', _to_images, _to_images_cpu)
_kernel = _primitive('depthwise_to_kernel', _to_kernel, _to_kernel_cpu)
ad.defbilinear(
    _forward,
    lambda g, x, kernel, **sizes: _images.bind(g, kernel, **sizes),
    lambda g, x, kernel, **sizes: _kernel.bind(x, g, **sizes),
)
ad.defbilinear(
    _images,
    lambda x, g, kernel, **sizes: _forward.bind(x, kernel, **sizes),
    lambda x, g, kernel, **sizes: _kernel.bind(x, g, **sizes),
)
ad.defbilinear(
    _kernel,
    lambda kernel, x, g, **sizes: _images.bind(g, kernel, **sizes),
    lambda kernel, x, g, **sizes: _forward.bind(x, kernel, **sizes),
)
