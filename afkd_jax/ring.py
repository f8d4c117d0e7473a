"""Who teaches whom: the teacher of network k is its predecessor, 1 -> 2, 2 -> 3, ..., K -> 1.

    K = 3:   teacher   1   2   3
                       |   |   |          D_2: real = map 1, fake = map 2
             pupil     2   3   1          D_3: real = map 2, fake = map 3      D_1: real = map 3, fake = map 1

For K = 2 the ring is the plain mutual pair. Source: paper, figure of the cyclic scheme.
"""  # noqa: E501 - the drawing

import jax
import jax.numpy as jnp


def teacher_of(network: int, networks: int) -> int:
    """Returns the index of the teacher of `network` among `networks`, both counted from 0."""
    return (network - 1) % networks


def teachers(own_Kx: jax.Array) -> jax.Array:
    """Returns what each network's teacher hands over: entry k is own_Kx[k - 1], gradient stopped.

    Every teacher enters every loss through this one stop_gradient.

    Args:
      own_Kx: logits or feature maps of all networks, stacked on the leading axis K.
    """
    return jax.lax.stop_gradient(jnp.roll(own_Kx, shift=1, axis=0))
