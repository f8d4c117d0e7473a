"""Arrays in single precision; trees of arrays: their fingerprint, layout and size."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns x in single precision; what is in double stays so."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def fingerprint(arrays: Any) -> str:
    """Returns a SHA-256 over every array: name, dtype, shape and bytes, in the tree's order.

    Two runs whose states have the same fingerprint are the same run, bit for bit.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(arrays)):
        array = np.ascontiguousarray(leaf)
        digest.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n'.encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def layout(arrays: Any) -> dict[str, str]:
    """Returns name -> dtype and shape of every array, or abstract array, of a tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): f'{leaf.dtype}{[*leaf.shape]}'
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }


def scalar_count(arrays: Any) -> int:
    """Returns the number of scalars in a tree of arrays, or abstract arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(arrays))


def byte_count(arrays: Any) -> int:
    """Returns the number of bytes in a tree of arrays, or abstract arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
