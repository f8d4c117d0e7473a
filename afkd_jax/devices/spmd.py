"""SPMD: what runs inside a mapped function, per device, and the names of the mesh axes."""

from typing import Any

import jax
import jax.numpy as jnp

# The axes of the mesh: networks are sharded over PEER, the batch over DATA.
PEER, DATA = 'peer', 'data'


def varying(tree: Any) -> Any:
    """Marks replicated arrays as this device's own copies along DATA.

    A gradient with respect to the result is that of this device's loss, which pmean then averages
    over devices. Without the mark the transpose of shard_map sums over devices first, so that the
    mean would be too large by their number.
    """
    return jax.tree.map(lambda x: jax.lax.pcast(x, DATA, to='varying'), tree)


def roll_across_devices(x_Lx: jax.Array, shift: int, axis: str) -> jax.Array:
    """Returns this device's shard of jnp.roll(whole, shift, axis=0).

    The whole is sharded over the mesh axis, L entries per device. Only what leaves its device is
    sent: for a roll by one, the last of the L entries.
    """
    count = jax.lax.axis_size(axis)
    devices, rest = divmod(shift, len(x_Lx))
    first = len(x_Lx) - rest

    def received(x: jax.Array, hops: int) -> jax.Array:  # from `hops` devices before this one
        if hops % count == 0:
            return x
        return jax.lax.ppermute(x, axis, [(p, (p + hops) % count) for p in range(count)])

    parts = [(x_Lx[first:], devices + 1), (x_Lx[:first], devices)]
    return jnp.concatenate([received(part, hops) for part, hops in parts if len(part)])


def whole_batch(x: jax.Array, axis: int = 0) -> jax.Array:
    """Returns the array of the global batch, on every device, from this device's shard."""
    return jax.lax.all_gather(x, DATA, axis=axis, tiled=True)


def batch_index(size: int) -> jax.Array:
    """Returns the places in the global batch of this device's shard, which has this size."""
    return jax.lax.axis_index(DATA) * size + jnp.arange(size)
