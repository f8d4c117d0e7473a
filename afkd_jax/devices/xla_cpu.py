"""Workarounds for XLA's CPU compiler; programs for GPUs and TPUs contain none of them.

What each gives is measured in docs/performance.md.
"""

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
