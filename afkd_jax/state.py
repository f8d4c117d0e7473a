"""Everything that changes while training, as pure pytrees: arrays only, and how they start."""

import hashlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from afkd_jax.cohort import Cohort


@flax.struct.dataclass
class NetworkState:
    """One network, with its transfer layer.

    Attributes:
      params: {'trunk': G_k, 'head': C_k}.
      transfer: the parameters of T_k; None where the map fits as it is.
      batch_stats: {'network': ..., 'transfer': ...}, the running statistics of the norms.
      logit_opt: state of the logit optimizer, over `params`.
      feature_opt: state of the feature optimizer, over {'trunk', 'transfer'}; None if unused.
    """

    params: Any
    transfer: Any
    batch_stats: Any
    logit_opt: Any
    feature_opt: Any


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
    params, stats = variables['params'], {'network': variables['batch_stats'], 'transfer': None}
    transfer = feature_opt = None
    if cohort.adversarial:
        if module := cohort.transfers[index]:
            maps = jnp.zeros((1, *cohort.map_shapes[index]))
            variables = module.init(jax.random.fold_in(key, 1), maps, False)
            transfer, stats['transfer'] = variables['params'], variables['batch_stats']
        feature_opt = cohort.optimizers.feature.init(
            {'trunk': params['trunk'], 'transfer': transfer}
        )
    logit_opt = cohort.optimizers.logit.init(params)
    return NetworkState(params, transfer, stats, logit_opt, feature_opt)


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


def abstract(cohort: Cohort) -> TrainState:
    """Returns the state's shapes and dtypes; no array is made."""
    return jax.eval_shape(lambda: create(cohort, jax.random.key(0)))


def parameter_count(params: Any) -> int:
    """Returns the number of trainable scalars in a tree of arrays, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def fingerprint(state: TrainState) -> str:
    """Returns a SHA-256 over every array: name, dtype, shape and bytes, in the tree's order.

    Two runs with one fingerprint are the same run, bit for bit.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state)):
        array = np.ascontiguousarray(leaf)
        digest.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n'.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
