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
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from afkd_jax.devices.spmd import PEER, roll_across_devices


@dataclasses.dataclass(frozen=True)
class Ring:
    """K networks in a ring."""

    order: tuple[int, ...]  # counted from 0; each teaches the next and the last the first
    peers: int = 1  # devices that share the networks, a divisor of K; above 1: order 0 .. K - 1

    def teacher_of(self, network: int, hops: int = 1) -> int:
        """Returns the network `hops` places before `network`, counted from 0."""
        return self.order[(self.order.index(network) - hops) % len(self.order)]

    def teachers(self, x_Lx: jax.Array, hops: int = 1) -> jax.Array:
        """Returns each network's teacher's array, gradient stopped: entry k is x[teacher_of(k)].

        Every teacher enters every loss through this one stop_gradient. L networks are this device's
        (all K where they are not sharded), and hops are 1 .. K - 1.
        """
        if self.peers > 1:
            rolled_Lx = roll_across_devices(x_Lx, hops, PEER)
        elif self.order == tuple(range(len(self.order))):
            rolled_Lx = jnp.roll(x_Lx, shift=hops, axis=0)
        else:
            rolled_Lx = jnp.roll(x_Lx[np.array(self.order)], shift=hops, axis=0)
            rolled_Lx = rolled_Lx[np.argsort(self.order)]
        return jax.lax.stop_gradient(rolled_Lx)

    def first(self, local: int) -> jax.Array | int:
        """Returns the index of this device's first network, given how many it has."""
        return jax.lax.axis_index(PEER) * local if self.peers > 1 else 0

    def gathered(self, values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns name -> [K, ...] of all networks, on every device, from [L, ...] of its own.

        By one sum over the devices: for numbers, not for large arrays.
        """
        if self.peers == 1:
            return values
        _, unravel = ravel_pytree(jax.tree.map(operator.itemgetter(0), values))
        own_LxN = jax.vmap(lambda one: ravel_pytree(one)[0])(values)
        zeros_KxN = jnp.zeros((len(self.order), own_LxN.shape[1]), own_LxN.dtype)
        zeros_KxN = jax.lax.pcast(zeros_KxN, PEER, to='varying')
        first = self.first(len(own_LxN))
        padded_KxN = jax.lax.dynamic_update_slice_in_dim(zeros_KxN, own_LxN, first, axis=0)
        return jax.vmap(unravel)(jax.lax.psum(padded_KxN, PEER))

    def logsumexp(self, x_Lx: jax.Array) -> jax.Array:
        """Returns log sum exp over all K networks, on every device."""
        result = jax.nn.logsumexp(x_Lx, axis=0)
        if self.peers == 1:
            return result
        largest = jax.lax.pmax(result, PEER)
        return jnp.log(jax.lax.psum(jnp.exp(result - largest), PEER)) + largest
