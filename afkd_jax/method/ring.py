"""The ring: the teacher of network k is its predecessor, 1 -> 2, 2 -> 3, ..., K -> 1.

    K = 3:   teacher   1   2   3
                       |   |   |          D_2: real = map 1, fake = map 2
             student   2   3   1          D_3: real = map 2, fake = map 3      D_1: real = map 3, fake = map 1

For K = 2 the ring is the plain mutual pair. Source: paper, figure of the cyclic scheme.

The networks may be sharded over devices, L = K / peers on each: device p has networks
pL .. (p + 1)L - 1, counted from 0. Then the teachers' arrays hop to the next device; no other
module depends on it.
"""  # noqa: E501 - the drawing

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from afkd_jax.devices.spmd import PEER, roll_across_devices


@dataclasses.dataclass(frozen=True)
class Ring:
    """K networks in a ring.

    Attributes:
      order: the networks, counted from 0; each teaches the next and the last the first.
      peers: devices along PEER over which the networks are sharded; a divisor of K. Above 1 the
        order is 0 .. K - 1 (checked in cohort.py).
    """

    order: tuple[int, ...]
    peers: int = 1

    def teacher_of(self, network: int, hops: int = 1) -> int:
        """Returns the network `hops` places before `network`, counted from 0."""
        return self.order[(self.order.index(network) - hops) % len(self.order)]

    def teachers(self, x_Lx: jax.Array, hops: int = 1) -> jax.Array:
        """Returns each network's teacher's array, gradient stopped: entry k is x[teacher_of(k)].

        Every teacher enters every loss through this one stop_gradient.

        Args:
          x_Lx: logits or feature maps of this device's networks, stacked on the leading axis; of
            all K networks where they are not sharded.
          hops: along the ring, in 1 .. K - 1.
        """
        if self.peers > 1:
            rolled_Lx = roll_across_devices(x_Lx, hops, PEER)
        elif self.order == tuple(range(len(self.order))):
            rolled_Lx = jnp.roll(x_Lx, shift=hops, axis=0)
        else:
            inverse_K = np.argsort(self.order)
            rolled_Lx = jnp.roll(x_Lx[np.array(self.order)], shift=hops, axis=0)[inverse_K]
        return jax.lax.stop_gradient(rolled_Lx)

    def first(self, local: int) -> jax.Array | int:
        """Returns the index of this device's first network, given how many it has."""
        return jax.lax.axis_index(PEER) * local if self.peers > 1 else 0

    def gathered(self, values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns name -> [K, ...] of all networks, on every device, from [L, ...] of its own.

        One small sum over the devices, for numbers and not for large arrays.
        """
        if self.peers == 1:
            return values
        flat = [value.reshape(len(value), -1) for value in values.values()]
        own_LxN = jnp.concatenate(flat, axis=1)
        zeros_KxN = jnp.zeros((len(self.order), own_LxN.shape[1]), own_LxN.dtype)
        first = self.first(len(own_LxN))
        all_KxN = jax.lax.psum(
            jax.lax.dynamic_update_slice_in_dim(
                jax.lax.pcast(zeros_KxN, PEER, to='varying'), own_LxN, first, axis=0
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
