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
    parts = [
        (x_Lx[len(x_Lx) - rest :], devices + 1),
        (x_Lx[: len(x_Lx) - rest], devices),
    ]
    return jnp.concatenate([_received(part, by, axis, count) for part, by in parts if len(part)])


def _received(x: jax.Array, shift: int, axis: str, count: int) -> jax.Array:
    """Returns the x of the device `shift` places before this one on the axis."""
    if shift % count == 0:
        return x
    return jax.lax.ppermute(x, axis, [(p, (p + shift) % count) for p in range(count)])
