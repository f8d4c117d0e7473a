"""The convolution and the norm that are injected into every network."""

import functools
from collections.abc import Callable

import flax.linen as nn

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
