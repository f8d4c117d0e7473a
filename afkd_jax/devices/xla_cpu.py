"""Workarounds for XLA's CPU compiler; programs for GPUs and TPUs contain none of them.

What each gives is measured in docs/performance.md.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# By default each convolution goes to YNNPACK, which from 32 channels on is half as fast as Eigen,
# and a third as fast in weight gradients. Naming what YNNPACK may have leaves convolutions to
# Eigen; the reductions of norms are faster in YNNPACK.
_OPTIONS = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}


def options(platform: str) -> dict[str, str] | None:
    """Returns the compiler options for devices of this platform; None: the defaults."""
    return _OPTIONS if platform == 'cpu' else None


def init_options(platform: str) -> dict[str, str] | None:
    """Returns those for initialising, which runs once: to compile takes longer than to run."""
    return {'xla_backend_optimization_level': '1'} if platform == 'cpu' else None


def transposed(linear: Callable[..., Any], g: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the transpose of a linear function of an array of this shape, applied to g."""
    like: Any = jax.typeof(g).update(shape=shape)  # varies over the mesh as g: no sum over devices
    return jax.linear_transpose(linear, like)(g)[0]


_MANY = 256  # channels; with fewer the gradient below is quick


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    """Is jax.lax.conv_general_dilated, as flax.linen.Conv calls it for [B, H, W, C].

    Where the output is smaller than the kernel, XLA:CPU computes the gradient to x one element at a
    time. There it is computed as that of a convolution of more zeros, with a larger output.
    """
    convolved = functools.partial(_convolved, strides=strides, padding=padding, options=options)
    out = jax.eval_shape(convolved, x, kernel)
    missing = max(kernel.shape[0] - out.shape[1], kernel.shape[1] - out.shape[2])
    if missing <= 0 or x.shape[-1] < _MANY:
        return convolved(x, kernel)

    def backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, kernel = saved
        sizes = {'strides': tuple(strides), 'padding': tuple(padding), 'side': x.shape[1:3]}
        to_x = _to_x.bind(g, kernel, missing=missing, options=tuple(options.items()), **sizes)
        return to_x, jax.linear_transpose(lambda kernel: convolved(x, kernel), kernel)(g)[0]

    convolution = jax.custom_vjp(convolved)
    convolution.defvjp(lambda x, kernel: (convolved(x, kernel), (x, kernel)), backward)
    return convolution(x, kernel)


def _convolved(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, options: Any, **_: Any
) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **dict(options))


def _gradient_to_x(
    g: jax.Array, kernel: jax.Array, side: Any, missing: int, padding: Any, **sizes: Any
) -> jax.Array:
    """Returns the gradient, by an output that has `missing` more rows and columns."""
    stride, (height, width) = max(sizes['strides']), g.shape[1:3]
    larger = [(before, after + stride * missing) for before, after in padding]

    def forward(x: jax.Array) -> jax.Array:
        return _convolved(x, kernel, padding=larger, **sizes)[:, :height, :width]

    return transposed(forward, g, (len(g), *side, kernel.shape[2]))


def _plain_gradient(g: jax.Array, kernel: jax.Array, missing: int, **sizes: Any) -> jax.Array:
    return _gradient_to_x(g, kernel, missing=0, **sizes)


def _gradient_to_kernel(x: jax.Array, g: jax.Array, kernel: Any, **sizes: Any) -> jax.Array:
    return transposed(lambda kernel: _convolved(x, kernel, **sizes), g, kernel.aval.shape)


_to_x = Primitive('gradient_to_x')
_to_x.def_impl(
    lambda g, kernel, **sizes: jax.jit(functools.partial(_plain_gradient, **sizes))(g, kernel)
)
_to_x.def_abstract_eval(
    lambda g, kernel, *, side, **_: g.update(shape=(g.shape[0], *side, kernel.shape[2]))
)
mlir.register_lowering(_to_x, mlir.lower_fun(_plain_gradient, multiple_results=False))
mlir.register_lowering(
    _to_x, mlir.lower_fun(_gradient_to_x, multiple_results=False), platform='cpu'
)
ad.defbilinear(
    _to_x,
    lambda x, g, kernel, **sizes: _convolved(x, kernel, **sizes),
    lambda x, g, kernel, **sizes: _gradient_to_kernel(x, g, kernel, **sizes),
)


def computed_once(x: jax.Array) -> jax.Array:
    """Returns x; it and its gradient are computed once, however many operations read them.

    XLA:CPU repeats an element-wise chain in each of its readers: in a residual network every weight
    gradient would recompute all activations before it. It never repeats a division, so each element
    is divided by a 1 that only LLVM, after this decision, can simplify. Exact, also for infinities
    and NaN. A division by one scalar becomes a product, which is repeated; optimization barriers
    are removed before the decision.
    """
    return _computed_once.bind(x)


_computed_once = Primitive('computed_once')
_computed_once.def_impl(lambda x: x)
_computed_once.def_abstract_eval(lambda x: x)
ad.deflinear2(_computed_once, lambda gradient, x: [computed_once(gradient)])
batching.primitive_batchers[_computed_once] = lambda xs, axes: (computed_once(*xs), *axes)
mlir.register_lowering(_computed_once, lambda context, x: [x])
_divided = mlir.lower_fun(
    lambda x: x / ((x == x) | (x != x)).astype(x.dtype), multiple_results=False
)
mlir.register_lowering(_computed_once, _divided, platform='cpu')
