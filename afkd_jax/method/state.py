"""Everything that changes while training, as pure pytrees: arrays only, and how they start."""

import functools
import hashlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from afkd_jax.method.cohort import Cohort


@flax.struct.dataclass
class NetworkState:
    """One network, with its transfer layer.

    Attributes:
      params: {'trunk': G_k, 'head': C_k, 'transfer': T_k}; T_k is None where there is none.
      batch_stats: {'network': ..., 'transfer': ...}, the running statistics of the norms.
      opt: state of each optimizer that moves this network ('logit', 'feature'), by name, each
        over the parts that it moves (Cohort.moves).
    """

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt: dict[str, Any]

    def variables(self) -> dict[str, Any]:
        """Returns what the network's module is applied to: G_k, C_k and their statistics."""
        params = {name: part for name, part in self.params.items() if name != 'transfer'}
        return {'params': params, 'batch_stats': self.batch_stats['network']}

    def transfer_variables(self) -> dict[str, Any]:
        """Returns what the transfer layer's module is applied to."""
        return {
            'params': self.params['transfer'],
            'batch_stats': self.batch_stats['transfer'],
        }


@flax.struct.dataclass
class DiscriminatorState:
    """One discriminator: parameters, and the state of its optimizer."""

    params: Any
    opt: Any


@flax.struct.dataclass
class TrainState:
    """The whole run.

    Attributes:
      step: int32 scalar, steps taken; what schedules and random keys count by.
      networks: K NetworkState.
      discriminators: K DiscriminatorState; () if the method has none.
    """

    step: jax.Array
    networks: tuple[NetworkState, ...]
    discriminators: tuple[DiscriminatorState, ...]


def _create_network(cohort: Cohort, index: int, key: jax.Array) -> NetworkState:
    image = jnp.zeros((1, *cohort.image_shape))
    variables = cohort.networks[index].init(key, image, False)
    params = {**variables['params'], 'transfer': None}
    stats = {'network': variables.get('batch_stats', {}), 'transfer': None}
    if cohort.maps_teach and (module := cohort.transfers[index]):
        maps = jnp.zeros((1, *cohort.map_shapes[index]))
        variables = module.init(jax.random.fold_in(key, 1), maps, False)
        # Empty where the transfer only pools.
        params['transfer'] = variables.get('params', {})
        stats['transfer'] = variables.get('batch_stats', {})
    rules = cohort.optimizers.used()
    opt = {
        name: rules[name].init({part: params[part] for part in parts})
        for name, parts in cohort.moves().items()
    }
    return NetworkState(params, stats, opt)


def _create_discriminator(cohort: Cohort, index: int, key: jax.Array) -> DiscriminatorState:
    maps = jnp.zeros((1, *cohort.shared_map))
    params = cohort.discriminators[index].init(jax.random.fold_in(key, 2), maps)['params']
    return DiscriminatorState(params, cohort.optimizers.discriminator.init(params))


def create(cohort: Cohort, key: jax.Array) -> TrainState:
    """Returns the state before the first step; every network starts from a key of its own."""
    keys = [jax.random.fold_in(key, k) for k in range(len(cohort.networks))]
    return TrainState(
        step=jnp.int32(0),
        networks=tuple(_create_network(cohort, k, key) for k, key in enumerate(keys)),
        discriminators=tuple(
            _create_discriminator(cohort, k, keys[k]) for k in range(len(cohort.discriminators))
        ),
    )


@functools.lru_cache(maxsize=1)
def abstract(cohort: Cohort) -> TrainState:
    """Returns the state's shapes and dtypes; no array is made."""
    return jax.eval_shape(lambda: create(cohort, jax.random.key(0)))


def stacked(state: TrainState) -> TrainState:
    """Returns the state with the networks, and the discriminators, stacked on a leading axis.

    Each of both is then one NetworkState or DiscriminatorState, or () if there are none. They must
    be of one architecture.
    """
    return state.replace(networks=stack(state.networks), discriminators=stack(state.discriminators))


def stack(parts: tuple) -> Any:
    """Returns trees of one structure as one, their arrays stacked; () of none."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) if parts else ()


def unstack(whole: Any) -> tuple:
    """Returns the trees that were stacked."""
    leaves = jax.tree.leaves(whole)
    count = len(leaves[0]) if leaves else 0
    return tuple(jax.tree.map(lambda leaf, k=k: leaf[k], whole) for k in range(count))


def unstacked(state: TrainState) -> TrainState:
    """Returns the state as it was before stacked()."""
    return state.replace(
        networks=unstack(state.networks), discriminators=unstack(state.discriminators)
    )


def alike(state: TrainState) -> bool:
    """Returns whether the networks have arrays of the same names, dtypes and shapes."""
    layouts = [layout(network) for network in state.networks]
    return all(other == layouts[0] for other in layouts)


def parameter_count(params: Any) -> int:
    """Returns the number of scalars in a tree of arrays, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def fingerprint(arrays: Any) -> str:
    """Returns a SHA-256 over every array: name, dtype, shape and bytes, in the tree's order.

    Two runs whose states have one fingerprint are the same run, bit for bit.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(arrays)):
        array = np.ascontiguousarray(leaf)
        digest.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n'.encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def digests(state: TrainState) -> dict[int, str]:
    """Returns network, counted from 0 -> fingerprint of it and its discriminator.

    Of those networks that this process has, and the same whether they are stacked or not.
    """
    if isinstance(state.networks, tuple):
        discriminators = state.discriminators or ((),) * len(state.networks)
        parts = dict(enumerate(zip(state.networks, discriminators, strict=True)))
    else:
        whole = state.networks, state.discriminators
        here = {k for span, _ in _spans(jax.tree.leaves(whole)[0]) for k in range(*span)}
        parts = {k: jax.tree.map(lambda leaf, k=k: _row(leaf, k), whole) for k in here}
    return {k: fingerprint(part) for k, part in parts.items()}


def _spans(stacked: jax.Array) -> list[tuple[tuple[int, int], jax.Array]]:
    """Returns ((first row, end), rows) of the parts of a stacked array that this process has."""
    return [
        (shard.index[0].indices(len(stacked))[:2], shard.data)
        for shard in stacked.addressable_shards
    ]


def _row(stacked: jax.Array, k: int) -> np.ndarray:
    """Returns the row of a stacked array, which this process has."""
    return next(
        np.asarray(rows)[k - first] for (first, end), rows in _spans(stacked) if first <= k < end
    )


def layout(arrays: Any) -> dict[str, str]:
    """Returns name -> dtype and shape of every array, or of every abstract one, of a tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): f'{leaf.dtype}{[*leaf.shape]}'
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }
