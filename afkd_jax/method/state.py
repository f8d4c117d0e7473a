"""The train state: everything that changes while training, as pure pytrees, and how it starts."""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from afkd_jax.devices import arrays
from afkd_jax.method.cohort import Cohort


@flax.struct.dataclass
class NetworkState:
    """One network, with its transfer layer.

    Attributes:
      params: {'trunk': G_k, 'head': C_k, 'transfer': T_k}; T_k is None where there is none.
      batch_stats: {'network': ..., 'transfer': ...}, the running statistics of the norms.
      opt: optimizer name -> its state over the parts that it updates (Cohort.updated_parts); {} of
        a frozen network.
      ema: averages of 'params' and 'batch_stats'; None without (config.ema), and of a frozen
        network.
    """

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt: dict[str, Any]
    ema: dict[str, Any] | None = None

    def variables(self) -> dict[str, Any]:
        """Returns the variables of the network's module."""
        params = {name: self.params[name] for name in ('trunk', 'head')}
        return {'params': params, 'batch_stats': self.batch_stats['network']}

    def transfer_variables(self) -> dict[str, Any]:
        """Returns the variables of the transfer layer's module."""
        return {'params': self.params['transfer'], 'batch_stats': self.batch_stats['transfer']}

    def averaged(self) -> 'NetworkState':
        """Returns the network with the averages in place of its weights; itself without."""
        return self.replace(**self.ema) if self.ema else self  # pyright: ignore - of flax.struct


@flax.struct.dataclass
class DiscriminatorState:
    """One discriminator.

    Attributes:
      params: with several stages (config.stages) a tuple, one discriminator's of each.
      opt: the state of its optimizer.
      batch_stats: the vectors of spectral norms, as `params`; {} without them.
    """

    params: Any
    opt: Any
    batch_stats: Any = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class AuxiliaryState:
    """The auxiliary module (Cohort.auxiliary), and the state of its logit optimizer."""

    params: Any
    batch_stats: Any
    opt: Any


@flax.struct.dataclass
class TrainState:
    """The state of a run."""

    step: jax.Array  # int32 scalar, steps taken; schedules and random keys are functions of it
    networks: tuple[NetworkState, ...]
    # None of a frozen network; () if the method has none
    discriminators: tuple[DiscriminatorState | None, ...]
    auxiliary: AuxiliaryState | None = None

    @property
    def stackable(self) -> bool:
        """Whether all networks have arrays of the same names, dtypes and shapes."""
        first, *others = (arrays.layout(network) for network in self.networks)
        return all(other == first for other in others)

    def stack(self) -> 'StackedState':
        """Returns the same state, stacked on a leading axis K."""
        networks, discriminators = stack(self.networks), stack(self.discriminators)
        return StackedState(self.step, networks, discriminators, self.auxiliary)

    def unstack(self) -> 'TrainState':
        """Returns itself."""
        return self

    def local_parts(self) -> dict[int | str, Any]:
        """Returns k -> (network, discriminator or ()), on the host, of this process's networks.

        And 'auxiliary' -> the auxiliary module, if there is one.
        """
        discriminators = self.discriminators or ((),) * len(self.networks)
        parts = jax.device_get(list(zip(self.networks, discriminators, strict=True)))
        return dict(enumerate(parts)) | _hosted(self.auxiliary)


@flax.struct.dataclass
class StackedState:
    """The TrainState of a cohort of one architecture, whose networks can be sharded over devices.

    Attributes:
      networks: one NetworkState, every array [K, ...].
      discriminators: likewise; () if the method has none.
    """

    step: jax.Array
    networks: Any
    discriminators: Any
    auxiliary: AuxiliaryState | None = None
    stackable = True

    def stack(self) -> 'StackedState':
        """Returns itself."""
        return self

    def unstack(self) -> TrainState:
        """Returns the same state as a tuple of networks."""
        networks, discriminators = unstack(self.networks), unstack(self.discriminators)
        return TrainState(self.step, networks, discriminators, self.auxiliary)

    def local_parts(self) -> dict[int | str, Any]:
        """See TrainState."""
        whole = self.networks, self.discriminators

        def shards(leaf: jax.Array) -> dict[int, Any]:  # by their first network; no copies of one
            return {shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards}

        leaves, structure = jax.tree.flatten(whole)
        hosted = [jax.device_get(shards(leaf)) for leaf in leaves]
        parts = {
            first + i: structure.unflatten([parts[first][i] for parts in hosted])
            for first in sorted(hosted[0])
            for i in range(len(hosted[0][first]))
        }
        return parts | _hosted(self.auxiliary)


def _hosted(auxiliary: AuxiliaryState | None) -> dict[int | str, Any]:
    return {'auxiliary': jax.device_get(auxiliary)} if auxiliary else {}


State = TrainState | StackedState


def averaged(networks: Any) -> Any:
    """Returns the networks of a state, a tuple or stacked, with averages in place of weights."""
    if isinstance(networks, NetworkState):
        return networks.averaged()
    return tuple(network.averaged() for network in networks)


def stack(parts: tuple) -> Any:
    """Returns trees of one structure as one tree of stacked arrays; () of none."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) if parts else ()


def unstack(whole: Any) -> tuple:
    """Returns the trees that were stacked."""
    leaves = jax.tree.leaves(whole)
    count = len(leaves[0]) if leaves else 0
    return tuple(jax.tree.map(operator.itemgetter(k), whole) for k in range(count))


def digests(parts: Mapping[int | str, Any]) -> dict[str, str]:
    """Returns k -> fingerprint of network k and its discriminator, of State.local_parts().

    And that of the auxiliary module.
    """
    return {str(k): arrays.fingerprint(part) for k, part in parts.items()}


def nonfinite(parts: Mapping[int | str, Any]) -> str | None:
    """Returns the name of an array that is not finite, of State.local_parts(); None if all are."""
    named = {}
    for k, part in parts.items():
        if k == 'auxiliary':
            named['.auxiliary'] = part
        else:
            named[f'.networks[{k}]'], named[f'.discriminators[{k}]'] = part
    for name, part in named.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.isfinite(leaf).all():
                return f'{name}{jax.tree_util.keystr(path)}'
    return None


def create(
    cohort: Cohort,
    key: jax.Array,
    starts: Mapping[int, dict[str, Any]] | None = None,
    options: dict[str, str] | None = None,
) -> TrainState:
    """Returns the state before the first step; every network starts from a key of its own.

    Networks of one name are traced and compiled once.

    Args:
      cohort: of all networks.
      key: of the run.
      starts: network, counted from 0 -> the params and batch_stats that it starts from instead;
        without params of 'head', the classifier is random.
      options: of the compiler; None inside a jitted function.
    """
    create_parts = jax.jit(_create_parts, static_argnums=(0, 1), compiler_options=options)
    parts = [
        create_parts(cohort, first, key, k, (starts or {}).get(k, {}))
        for k, first in enumerate(_firsts(cohort))
    ]
    networks, discriminators = zip(*parts, strict=True)
    discriminators = discriminators if cohort.discriminators else ()
    auxiliary = None
    if cohort.auxiliary:
        create_auxiliary = jax.jit(_create_auxiliary, static_argnums=0, compiler_options=options)
        auxiliary = create_auxiliary(cohort, key)
    return TrainState(jnp.int32(0), networks, discriminators, auxiliary)


@functools.lru_cache(maxsize=1)
def abstract(cohort: Cohort) -> TrainState:
    """Returns the state's shapes and dtypes; makes no array."""
    return jax.eval_shape(lambda: create(cohort, jax.random.key(0)))


def _firsts(cohort: Cohort) -> list[int]:
    """Returns per network the first whose state has the same arrays: of its name, frozen or not."""
    kinds = [(name, cohort.learns(k)) for k, name in enumerate(cohort.names)]
    return [kinds.index(kind) for kind in kinds]


def _create_parts(
    cohort: Cohort, index: int, key: jax.Array, number: int, start: dict[str, Any]
) -> tuple[NetworkState, DiscriminatorState | None]:
    """Returns a network and its discriminator, None if it has none.

    Args:
      cohort: of all networks.
      index: of the first network of its kind (_firsts).
      key: of the run.
      number: of the network itself, counted from 0; its key depends on it.
      start: what it starts from, see create().
    """
    own = jax.random.fold_in(key, number)
    discriminator = None
    if cohort.discriminators and cohort.learns(index):
        discriminator = _create_discriminator(cohort, index, own)
    return _create_network(cohort, index, own, start), discriminator


def _create_network(
    cohort: Cohort, index: int, key: jax.Array, start: dict[str, Any]
) -> NetworkState:
    image = jnp.zeros((1, *cohort.image_shape))
    variables = cohort.networks[index].init(key, image, False)
    params = {**variables['params'], **start.get('params', {}), 'transfer': None}
    stats = {
        'network': start.get('batch_stats', variables.get('batch_stats', {})),
        'transfer': None,
    }
    if module := cohort.transfers[index]:
        zeros = tuple(jnp.zeros((1, *shape)) for shape in cohort.stage_shapes[index])
        maps = zeros if cohort.stages > 1 else zeros[0]
        variables = module.init(jax.random.fold_in(key, 1), maps, False)
        params['transfer'] = variables.get('params', {})  # empty where the layer only pools
        stats['transfer'] = variables.get('batch_stats', {})
    rules = cohort.optimizers.used()
    updated = cohort.updated_parts() if cohort.learns(index) else {}
    opt = {
        name: rules[name].of(index).init({part: params[part] for part in parts})
        for name, parts in updated.items()
    }
    averages = cohort.ema_decay and cohort.learns(index)
    return NetworkState(
        params, stats, opt, {'params': params, 'batch_stats': stats} if averages else None
    )


def _create_discriminator(cohort: Cohort, index: int, key: jax.Array) -> DiscriminatorState:
    rule, module = cohort.optimizers.discriminator, cohort.discriminators[index]
    assert rule and module  # noqa: PT018
    conditions = (jnp.zeros((1, module.classes)),) if module.classes else ()
    # The last stage has key 2, so that it starts the same however many there are.
    stages = [
        module.init(jax.random.fold_in(key, 2 + before), jnp.zeros((1, *shape)), *conditions)
        for before, shape in enumerate(reversed(cohort.shared_shapes))
    ][::-1]
    params = tuple(each['params'] for each in stages)
    stats = tuple(each['batch_stats'] if module.has_state else {} for each in stages)
    if cohort.stages == 1:
        [params], [stats] = params, stats
    return DiscriminatorState(params, rule.init(params), stats)


def _create_auxiliary(cohort: Cohort, key: jax.Array) -> AuxiliaryState:
    assert cohort.auxiliary
    count = len(cohort.networks)
    maps = [jnp.zeros((1, *(cohort.shared_map or shape))) for shape in cohort.map_shapes]
    logits = jnp.zeros((count, 1, cohort.num_classes))
    # The networks have the keys 0 .. K - 1.
    variables = cohort.auxiliary.init(jax.random.fold_in(key, count), logits, maps, False)
    params = variables.get('params', {})
    opt = cohort.optimizers.logit.init(params)
    return AuxiliaryState(params, variables.get('batch_stats', {}), opt)
