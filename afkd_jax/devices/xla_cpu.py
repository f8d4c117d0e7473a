"""What XLA's compiler for CPUs must be told; nothing of it is in a program for GPUs or TPUs.

What each piece gives is measured in README, "Speed".
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# By default each convolution goes to YNNPACK, which with 32 channels and more is half as fast as
# Eigen, and a third as fast in weight gradients. To name what YNNPACK may have leaves them to
# Eigen; the sums over an array that norms take are faster in YNNPACK.
_OPTIONS = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}


def options(platform: str) -> dict[str, str] | None:
    """Returns the options of a compilation for devices of this platform; None: its defaults."""
    return _OPTIONS if platform == 'cpu' else None


def kept(x: jax.Array) -> jax.Array:
    """Returns x; it and its gradient are arrays that are computed once, however many read them.

    XLA's compiler for CPUs repeats an element-wise chain in each of its readers: in a residual
    network every weight gradient would compute all activations before it once more. It never
    repeats a division; so each element is divided by a 1 of which only the compiler's last stage,
    after all this is decided, knows that it is 1. Exact, also for infinities and NaN. A division
    by one scalar is turned into a product, which is repeated; optimization barriers are gone
    before it is decided.
    """
    return _kept.bind(x)


def _divided(x: jax.Array) -> jax.Array:
    return x / ((x == x) | (x != x)).astype(x.dtype)


_kept = Primitive('kept')
_kept.def_impl(lambda x: x)
_kept.def_abstract_eval(lambda x: x)
ad.deflinear2(_kept, lambda gradient, x: [kept(gradient)])
batching.primitive_batchers[_kept] = lambda values, axes: (kept(values[0]), axes[0])
mlir.register_lowering(_kept, lambda context, x: [x])
mlir.register_lowering(_kept, mlir.lower_fun(_divided, multiple_results=False), platform='cpu')
