"""Multiply-adds of a function, counted by formula in its jaxpr."""

import math
from typing import Any

import jax
import jax.extend.core


def multiply_adds(function: Any, *arguments: Any) -> int:
    """Returns the multiply-adds of a function's convolutions and matrix products.

    Element-wise work, norms and pooling do not count, as in the literature. Taps on padding do.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        outputs = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == 'conv_general_dilated':
            kernel = equation.invars[1].aval.shape
            out_channels = kernel[equation.params['dimension_numbers'].rhs_spec[0]]
            total += outputs * math.prod(kernel) // out_channels
        elif form := equation.params.get('form'):  # devices.convolution
            arrays, end = equation.invars, equation.primitive.name[-9:]
            g = {'to_images': arrays[0], 'to_kernel': arrays[1]}.get(end, equation.outvars[0])
            total += math.prod(form.kernel[:3]) * math.prod(g.aval.shape)
        elif equation.primitive.name == 'dot_general':
            (contracted, _), _ = equation.params['dimension_numbers']
            shape = equation.invars[0].aval.shape
            total += outputs * math.prod(shape[axis] for axis in contracted)
        total += sum(_count(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total
