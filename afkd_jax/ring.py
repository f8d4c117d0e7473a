"""Who teaches whom: the teacher of network k is its predecessor, 1 -> 2, 2 -> 3, ..., K -> 1.

    K = 3:   teacher   1   2   3
                       |   |   |          D_2: real = map 1, fake = map 2
             pupil     2   3   1          D_3: real = map 2, fake = map 3      D_1: real = map 3, fake = map 1

For K = 2 the ring is the plain mutual pair. Source: paper, figure of the cyclic scheme.
"""  # noqa: E501 - the drawing

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Ring:
    """K networks in a circle.

    Attributes:
      order: the networks, counted from 0, as one teaches the next and the last the first; a
        permutation of 0 .. K - 1.
    """

    order: tuple[int, ...]

    def teacher_of(self, network: int, hops: int = 1) -> int:
        """Returns the network that stands `hops` places before `network`, counted from 0."""
        return self.order[(self.order.index(network) - hops) % len(self.order)]

    def teachers(self, own_Kx: jax.Array, hops: int = 1) -> jax.Array:
        """Returns what each network's teacher hands over, gradient stopped.

        Entry k is own_Kx[teacher_of(k, hops)]. Every teacher enters every loss through this one
        stop_gradient.

        Args:
          own_Kx: logits or feature maps of all networks, stacked on the leading axis K.
          hops: how many places along the ring they travel.
        """
        if self.order == tuple(range(len(self.order))):
            moved_Kx = jnp.roll(own_Kx, shift=hops, axis=0)
        else:
            place_K = np.argsort(self.order)
            moved_Kx = jnp.roll(own_Kx[np.array(self.order)], shift=hops, axis=0)[place_K]
        return jax.lax.stop_gradient(moved_Kx)
