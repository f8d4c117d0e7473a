"""Who teaches whom: the teacher of network k is its predecessor, 1 -> 2, 2 -> 3, ..., K -> 1.

    K = 3:   teacher   1   2   3
                       |   |   |          D_2: real = map 1, fake = map 2
             pupil     2   3   1          D_3: real = map 2, fake = map 3      D_1: real = map 3, fake = map 1

For K = 2 the ring is the plain mutual pair. Source: paper, figure of the cyclic scheme.

The networks may be spread over devices, L = K / peers on each: device p has the networks
pL .. (p + 1)L - 1, counted from 0. Then what a teacher hands over hops to the next device, and this
is the only room that knows of it.
"""  # noqa: E501 - the drawing

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from afkd_jax.devices.mesh import PEER, rolled


@dataclasses.dataclass(frozen=True)
class Ring:
    """K networks in a circle.

    Attributes:
      order: the networks, counted from 0, as one teaches the next and the last the first; a
        permutation of 0 .. K - 1.
      peers: over how many devices, along the axis PEER, the networks are spread; a divisor of K.
        Above 1 the order must be as listed (run.py sees to it).
    """

    order: tuple[int, ...]
    peers: int = 1

    def teacher_of(self, network: int, hops: int = 1) -> int:
        """Returns the network that stands `hops` places before `network`, counted from 0."""
        return self.order[(self.order.index(network) - hops) % len(self.order)]

    def teachers(self, own_Lx: jax.Array, hops: int = 1) -> jax.Array:
        """Returns what each network's teacher hands over, gradient stopped.

        Entry k is own_Kx[teacher_of(k, hops)]. Every teacher enters every loss through this one
        stop_gradient.

        Args:
          own_Lx: logits or feature maps of the networks of this device, stacked on the leading
            axis: of all K where they are not spread.
          hops: how many places along the ring they travel, in 1 .. K - 1.
        """
        if self.peers > 1:
            moved_Lx = rolled(own_Lx, hops, PEER)
        elif self.order == tuple(range(len(self.order))):
            moved_Lx = jnp.roll(own_Lx, shift=hops, axis=0)
        else:
            place_K = np.argsort(self.order)
            moved_Lx = jnp.roll(own_Lx[np.array(self.order)], shift=hops, axis=0)[place_K]
        return jax.lax.stop_gradient(moved_Lx)

    def first(self, here: int) -> jax.Array | int:
        """Returns the number, counted from 0, of the first of the `here` networks of a device."""
        return jax.lax.axis_index(PEER) * here if self.peers > 1 else 0

    def gathered(self, values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns name -> [K, ...] of all networks, on every device, from [L, ...] of its own.

        One small sum over the devices; meant for numbers, not for arrays of size.
        """
        if self.peers == 1:
            return values
        flat = [value.reshape(len(value), -1) for value in values.values()]
        own_LxN = jnp.concatenate(flat, axis=1)
        none_KxN = jnp.zeros((len(self.order), own_LxN.shape[1]), own_LxN.dtype)
        place = self.first(len(own_LxN))
        all_KxN = jax.lax.psum(
            jax.lax.dynamic_update_slice_in_dim(
                jax.lax.pcast(none_KxN, PEER, to='varying'), own_LxN, place, axis=0
            ),
            PEER,
        )
        parts = jnp.split(all_KxN, np.cumsum([part.shape[1] for part in flat])[:-1], axis=1)
        return {
            name: part.reshape(-1, *value.shape[1:]).astype(value.dtype)
            for (name, value), part in zip(values.items(), parts, strict=True)
        }

    def logsumexp(self, x_Lx: jax.Array) -> jax.Array:
        """Returns log sum exp over all K networks, on every device."""
        result = jax.nn.logsumexp(x_Lx, axis=0)
        if self.peers == 1:
            return result
        largest = jax.lax.pmax(result, PEER)
        return jnp.log(jax.lax.psum(jnp.exp(result - largest), PEER)) + largest
