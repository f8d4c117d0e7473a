"""The training step and the evaluation step of one device, pure.

One forward pass of every network gives (logits, map). The losses (objective.py) are pulled back
through that one pass, once per optimizer, and all gradients are taken at the step's starting
parameters; then the updates are applied in the order logit, feature, discriminator. So the step is
a pure function of (state, batch, key).
Source: separate optimizers and the single pass are reported by a third party; the discriminator's
place in the order is our choice.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from afkd_jax.config import Data
from afkd_jax.data import augment
from afkd_jax.data.images import DeviceImages
from afkd_jax.devices.arrays import at_least_float32
from afkd_jax.devices.spmd import DATA, varying
from afkd_jax.method import losses, metrics
from afkd_jax.method.adversary import Discriminator
from afkd_jax.method.auxiliary import error_products
from afkd_jax.method.cohort import Cohort
from afkd_jax.method.objective import AuxiliaryFn, DiscriminatorFn
from afkd_jax.method.optim import Optimizer
from afkd_jax.method.state import (
    AuxiliaryState,
    DiscriminatorState,
    NetworkState,
    TrainState,
    stack,
    unstack,
)


def value_shapes(cohort: Cohort) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the values that a step reports.

    One per network, [K]: the losses (Objective.value_names); accuracy, in percent; grad_norm_*,
    the L2 norms of the gradients; adversarial_balance, see _balance. One per step: learning_rate_*,
    of each optimizer, unless the networks' differ; of an auxiliary module its losses
    (Objective.step_value_names) and grad_norm_auxiliary.
    """
    used = cohort.optimizers.used()
    names = [*cohort.objective.value_names(), 'accuracy', *(f'grad_norm_{name}' for name in used)]
    if cohort.objective.balanced:
        names.append('adversarial_balance')
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (len(cohort.names),))
    shapes |= {
        f'learning_rate_{name}': (len(cohort.names),) if rule.per_network else ()
        for name, rule in used.items()
    }
    if cohort.auxiliary:
        names = [*cohort.objective.step_value_names(), 'grad_norm_auxiliary']
        shapes |= dict.fromkeys(names, ())
    return shapes


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One network's forward pass: in training mode, or of a frozen network in evaluation mode."""

    logits: jax.Array
    maps: Any  # after the transfer layers, if there are any; a tuple of several stages
    # The new running statistics, as in NetworkState; None of a frozen network.
    batch_stats: dict[str, Any] | None
    # (cotangent of logits, cotangent of maps) -> gradients of trunk, head and transfer; {} of a
    # frozen network
    pull: Callable[[jax.Array, Any], dict[str, Any]]
    # The same cotangents -> gradient to the trunk's map, before the transfer layer; of one stage
    to_trunk: Callable[[jax.Array, jax.Array], jax.Array]
    taught: tuple[jax.Array, Any]  # logits and maps as a teacher


def _forward(
    module: nn.Module, variables: dict, inputs: jax.Array, key: jax.Array
) -> tuple[Any, Callable, Any]:
    """Returns (outputs, pullback to (params, inputs), new batch statistics)."""

    def apply(params: Any, inputs: jax.Array) -> Any:
        return _trained(module, variables | {'params': params}, inputs, key)

    return jax.vjp(apply, varying(variables['params']), inputs, has_aux=True)


_zeros = functools.partial(jax.tree.map, jnp.zeros_like)


def _added(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    return jax.tree.map(jnp.add, list(one), list(other))


# K networks of one architecture are traced, differentiated and lowered once.
_once = functools.partial(jax.jit, static_argnums=0)
_norm = jax.jit(optax.tree.norm)


@_once
def _trained(
    module: nn.Module, variables: dict, inputs: jax.Array, key: jax.Array
) -> tuple[Any, Any]:
    outputs, updated = module.apply(
        variables, inputs, True, mutable=['batch_stats'], rngs={'dropout': key}
    )
    return outputs, updated.get('batch_stats', {})


@_once
def evaluated(module: nn.Module, variables: dict, inputs: jax.Array) -> Any:
    """Returns a module's outputs in evaluation mode, traced once for equal modules and shapes."""
    return module.apply(variables, inputs, False)


def _pass(
    cohort: Cohort, k: int, state: NetworkState, images_BxHxWxC: jax.Array, key: jax.Array
) -> _Pass:

    def taught_by(state: NetworkState) -> tuple[jax.Array, Any]:
        logits, maps = evaluated(cohort.networks[k], state.variables(), images_BxHxWxC)
        if module := cohort.transfers[k]:
            maps = evaluated(module, state.transfer_variables(), maps)
        return logits, maps

    if not cohort.learns(k):
        logits, maps = taught_by(state)
        nothing = _zeros(maps)
        return _Pass(logits, maps, None, lambda *_: {}, lambda *_: nothing, (logits, maps))
    (logits, own_maps), pull_network, stats = _forward(
        cohort.networks[k], state.variables(), images_BxHxWxC, key
    )
    maps, batch_stats, pull_transfer = own_maps, {'network': stats, 'transfer': None}, None
    if module := cohort.transfers[k]:
        maps, pull_transfer, batch_stats['transfer'] = _forward(
            module, state.transfer_variables(), maps, key
        )

    def pull(to_logits: jax.Array, to_maps: Any) -> dict[str, Any]:
        to_transfer = None
        if pull_transfer:
            to_transfer, to_maps = pull_transfer(to_maps)
        to_network, _ = pull_network((to_logits, to_maps))
        return {**to_network, 'transfer': to_transfer}

    def to_trunk(to_logits: jax.Array, to_maps: jax.Array) -> jax.Array:
        head, variables = cohort.networks[k].head, {'params': state.params['head']}
        _, pull_head = jax.vjp(lambda maps: head.apply(variables, maps), own_maps)
        return pull_head(to_logits)[0] + (pull_transfer(to_maps)[1] if pull_transfer else to_maps)

    taught = taught_by(state.averaged()) if cohort.ema_teaches else (logits, maps)
    return _Pass(logits, maps, batch_stats, pull, to_trunk, taught)


@_once
def _stepped(rule: Optimizer, *arguments: Any) -> tuple[Any, Any]:
    return rule.apply(*arguments)


def _updated(
    cohort: Cohort,
    state: TrainState,
    gradients: dict[str, Any],
    batch_stats: list[Any],
    discriminator_stats: list[Any],
    auxiliary_stats: Any,
    paused: jax.Array | None,
) -> TrainState:
    """Returns the new state; of a paused network, of bool [K], only the batch statistics change."""
    rules, networks, discriminators = cohort.optimizers.used(), [], []
    for k, network in enumerate(state.networks):
        if not cohort.learns(k):
            networks.append(network)
            continue
        params, opt = network.params, {}
        for name, parts in cohort.updated_parts().items():
            old = {part: params[part] for part in parts}
            rule, gradient = rules[name].of(k), gradients[name][k]
            new, opt[name] = _stepped(rule, gradient, network.opt[name], old, state.step)
            params = params | new
        if paused is not None:
            keep = functools.partial(jnp.where, paused[k])
            params, opt = jax.tree.map(keep, (network.params, network.opt), (params, opt))
        ema = network.ema and _moved(
            network.ema, {'params': params, 'batch_stats': batch_stats[k]}, cohort, state.step
        )
        networks.append(NetworkState(params, batch_stats[k], opt, ema))
    for k, discriminator in enumerate(state.discriminators):
        if discriminator is None:
            discriminators.append(None)
            continue
        gradient = gradients['discriminator'][k]
        new, opt = _stepped(
            rules['discriminator'], gradient, discriminator.opt, discriminator.params, state.step
        )
        discriminators.append(DiscriminatorState(new, opt, discriminator_stats[k]))
    auxiliary = state.auxiliary
    if auxiliary:
        new, opt = rules['logit'].apply(
            gradients['auxiliary'], auxiliary.opt, auxiliary.params, state.step
        )
        auxiliary = AuxiliaryState(new, auxiliary_stats, opt)
    return TrainState(state.step + 1, tuple(networks), tuple(discriminators), auxiliary)


def _moved(averages: Any, new: Any, cohort: Cohort, step: jax.Array) -> Any:
    """Returns the averages after this step, d old + (1 - d) new, d = min(1 - 1 / t, ema_decay).

    t is the number of the step, counted from 1: at first the average is the plain mean.
    Source: PCL, Wu and Gong 2021; there, of parameters.
    """
    decay = jnp.minimum(1 - 1 / (step + 1), cohort.ema_decay)
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, averages, new)


def _discriminator_fn(module: Discriminator | None, batch_stats: Any) -> DiscriminatorFn | None:
    if module is None:
        return None

    def discriminate(params: Any, maps: jax.Array, condition: Any) -> tuple[jax.Array, Any]:
        variables = {'params': params, 'batch_stats': batch_stats}
        return _discriminated(module, variables, maps, condition)

    return discriminate


@_once
def _discriminated(
    module: Discriminator, variables: dict, maps: jax.Array, condition: Any
) -> tuple[jax.Array, Any]:
    outputs, updated = module.apply(variables, maps, condition, mutable=['batch_stats'])
    # The running statistics of batch norms are dropped.
    return outputs, updated['batch_stats'] if module.has_state else {}


def _of_adversaries(
    cohort: Cohort,
    state: TrainState,
    passes: list[_Pass],
    of_logits: tuple[Any, Any],
    labels_B: jax.Array,
    mixed: augment.Mixed | None,
    entropy_K: jax.Array,
) -> tuple[Any, list[Any], list[Any], dict[str, jax.Array]]:
    """Returns the gradients of L_G to the maps, and the others of Objective.of_adversaries.

    `of_logits` are the gradients of the logit losses to logits and maps. With several stages L_G
    and the values are means over them, and the others are tuples.
    """
    objective, step, ring = cohort.objective, state.step, cohort.ring
    weight, balanced = objective.adversarial_weight(step), objective.balanced
    maps, taught_logits, taught_maps = map(
        stack, zip(*[(own.maps, *own.taught) for own in passes], strict=True)
    )
    conditions = objective.conditions(
        jnp.stack([own.logits for own in passes]), taught_logits, labels_B, mixed
    )

    def of_stage(pick: Callable[[Any], Any]) -> Any:
        picked = [own and (pick(own.params), pick(own.batch_stats)) for own in state.discriminators]
        return objective.of_adversaries(
            [
                _discriminator_fn(module, own and own[1])
                for module, own in zip(cohort.discriminators, picked, strict=True)
            ],
            [own and varying(own[0]) for own in picked],
            pick(maps),
            pick(taught_maps),
            conditions,
            step,
            1.0 if balanced else weight,
        )

    to_maps, gradients, stats, values = _over_stages(cohort, of_stage)
    if balanced:
        balance_K = _balance(objective.adversarial.balance_limit, passes, of_logits, to_maps)
        to_maps *= weight * balance_K[:, None, None, None, None]
        values['adversarial_balance'] = varying(balance_K)
    if objective.adversarial.direction == 'better_only':
        taught_K = objective.entropy(taught_logits, labels_B, mixed)
        entropy_K, taught_K = jax.lax.pmean((entropy_K, taught_K), DATA)
        better_K = ring.teachers(taught_K) < entropy_K
        to_maps = jax.tree.map(lambda own: own * better_K[:, None, None, None, None], to_maps)
    return to_maps, gradients, stats, values


def _over_stages(cohort: Cohort, of_stage: Callable[[Callable[[Any], Any]], Any]) -> Any:
    """Returns (gradients to the maps, ..., values) of all stages, by of_stage of each.

    of_stage has a function that picks the stage's part of maps or parameters, and returns a tuple:
    first gradients to maps and last values, of which the means are taken; between them lists over
    the networks, whose entries become tuples over the stages.
    """
    if cohort.stages == 1:
        return of_stage(lambda whole: whole)
    found = [of_stage(operator.itemgetter(stage)) for stage in range(cohort.stages)]
    to_maps, *lists, values = zip(*found, strict=True)
    return (
        tuple(own / cohort.stages for own in to_maps),
        *([None if own[0] is None else own for own in zip(*each, strict=True)] for each in lists),
        {name: sum(own[name] for own in values) / cohort.stages for name in values[0]},
    )


def _balance(
    limit: float, passes: list[_Pass], of_logits: tuple[Any, Any], to_maps: jax.Array
) -> jax.Array:
    """Returns |gradient of the logit loss| / |gradient of L_G|, at most `limit`: [K].

    Both at the trunk's map, over the global batch. Source: Esser et al. 2021 (VQGAN), there at the
    last layer.
    """

    def squares(gradient: jax.Array) -> jax.Array:
        return jnp.square(at_least_float32(gradient)).sum()

    pairs = [
        (own.to_trunk(*pair), own.to_trunk(jnp.zeros_like(own.logits), to_map))
        for own, *pair, to_map in zip(passes, *of_logits, to_maps, strict=True)
    ]
    squares_Kx2 = jnp.stack([jnp.stack([*map(squares, pair)]) for pair in pairs])
    logit_K, adversarial_K = jnp.sqrt(jax.lax.psum(squares_Kx2, DATA)).T
    return jnp.minimum(logit_K / (adversarial_K + 1e-12), limit)


def _auxiliary_fn(module: nn.Module, batch_stats: Any) -> AuxiliaryFn:
    def apply(params: Any, logits_KxBxC: jax.Array, maps: Any) -> tuple[Any, Any]:
        variables = {'params': params, 'batch_stats': batch_stats}
        outputs, new = module.apply(variables, logits_KxBxC, maps, True, mutable=['batch_stats'])
        return outputs, new.get('batch_stats', {})

    return apply


def update(
    cohort: Cohort,
    state: TrainState,
    images_BxHxWxC: jax.Array,
    labels_B: jax.Array,
    key: jax.Array,
    mixed: augment.Mixed | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after one step on this batch, and the step's values (value_shapes).

    Runs on one device, inside a mapped function: B is this device's shard of the batch. Batch
    statistics (unless local), losses and gradients are over the global batch. Where the networks
    are sharded, these are this device's, and the ring brings the teachers' arrays.

    Args:
      cohort: this device's part (Cohort.local).
      images_BxHxWxC: standardised; [K, B, H, W, C] where each network sees its own view of them.
      labels_B: of the images before they were mixed; `accuracy` is of these.
      key: of this step, for dropout.
      mixed: what the images are mixed with.
    """
    objective, ring, used = cohort.objective, cohort.ring, cohort.optimizers.used()
    first = ring.first(len(state.networks))
    own_views = images_BxHxWxC.ndim == 5
    passes = [
        _pass(
            cohort,
            k,
            network,
            images_BxHxWxC[k] if own_views else images_BxHxWxC,
            jax.random.fold_in(key, first + k),
        )
        for k, network in enumerate(state.networks)
    ]
    logits_KxBxC = jnp.stack([own.logits for own in passes])
    taught_KxBxC = jnp.stack([own.taught[0] for own in passes]) if cohort.ema_teaches else None
    # What each optimizer pulls back: (to logits, to maps), entry k or zeros.
    no_maps = [_zeros(own.maps) for own in passes]
    gradients: dict[str, Any] = {}
    auxiliary_stats, auxiliary_to_maps = None, no_maps
    if cohort.auxiliary and state.auxiliary:
        module = _auxiliary_fn(cohort.auxiliary, state.auxiliary.batch_stats)
        inputs = varying(state.auxiliary.params), logits_KxBxC, [own.maps for own in passes]
        pulled, (values, auxiliary_stats) = objective.of_auxiliary(
            module, *inputs, labels_B, state.step, mixed
        )
        gradients['auxiliary'], to_logits, auxiliary_to_maps = pulled
    else:
        to_logits, values = objective.of_logits(
            logits_KxBxC, labels_B, state.step, mixed, taught_KxBxC
        )
    if cohort.method.switches:
        values |= objective.distances(logits_KxBxC, labels_B)
    values['accuracy'] = 100.0 * (logits_KxBxC.argmax(-1) == labels_B[None]).mean(1)

    no_logits = [jnp.zeros_like(own.logits) for own in passes]
    discriminator_stats: list[Any] = []
    cotangents: dict[str, tuple[Any, Any]] = {'logit': (to_logits, auxiliary_to_maps)}
    if cohort.method.uses_maps:
        if cohort.method.adversarial:
            to_maps, gradients['discriminator'], discriminator_stats, more = _of_adversaries(
                cohort, state, passes, cotangents['logit'], labels_B, mixed, values['cross_entropy']
            )
            to_maps = unstack(to_maps)
            if cohort.optimizers.feature:
                cotangents['feature'] = (no_logits, to_maps)
            else:
                cotangents['logit'] = (to_logits, _added(to_maps, auxiliary_to_maps))
        else:
            maps = stack(tuple(own.maps for own in passes))
            taught = stack(tuple(own.taught[1] for own in passes)) if cohort.ema_teaches else maps
            to_maps, more = _over_stages(
                cohort, lambda pick: objective.of_maps(pick(maps), labels_B, pick(taught))
            )
            to_maps = unstack(to_maps)
            if cohort.auxiliary:
                to_maps = _added(to_maps, auxiliary_to_maps)
            cotangents['logit'] = (to_logits, to_maps)
        values |= more
    for name, (to_logits, to_maps) in cotangents.items():
        pulled = [own.pull(to_logits[k], to_maps[k]) for k, own in enumerate(passes)]
        parts = cohort.updated_parts()[name]
        gradients[name] = [own and {part: own[part] for part in parts} for own in pulled]

    batch_stats = [own.batch_stats for own in passes]
    averaged = gradients, values, discriminator_stats
    gradients, values, discriminator_stats = jax.lax.pmean(averaged, DATA)
    if cohort.local_statistics:
        batch_stats, auxiliary_stats = jax.lax.pmean((batch_stats, auxiliary_stats), DATA)
    for name in used:
        values[f'grad_norm_{name}'] = jnp.stack([_norm(own) for own in gradients[name]])
    if cohort.auxiliary:  # then no network is sharded
        values['grad_norm_auxiliary'] = optax.tree.norm(gradients['auxiliary'])
    values, paused = ring.gathered(values), None
    if cohort.method.switches:
        values['paused'] = objective.paused(values).astype(values['accuracy'].dtype)
        paused = objective.paused(values)[first + jnp.arange(len(passes))]
    for name, optimizer in used.items():
        values[f'learning_rate_{name}'] = optimizer.rates(state.step)
    every_stats = batch_stats, discriminator_stats, auxiliary_stats
    return _updated(cohort, state, gradients, *every_stats, paused), values


def train_step(
    cohort: Cohort,
    data: Data,
    state: TrainState,
    sums: metrics.Sums,
    images: DeviceImages,
    index_B: jax.Array,
    key: jax.Array,
) -> tuple[TrainState, metrics.Sums]:
    """Returns (state, sums) after gathering, augmenting and learning this device's batch.

    Where a reported value or the norm of a gradient is not finite, only the step counter changes:
    parameters, statistics and optimizers stay as they were, and the sums count a skipped step.
    Whether the run continues is decided on the host.

    Args:
      cohort: this device's part (Cohort.local).
      data: how the training images are augmented.
      images: all images, or those of the batch.
      index_B: this device's shard of the batch's indices.
      key: of the run; what is random in a step is a function of (key, step).
    """
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    if data.views == 'own':
        first = cohort.ring.first(len(state.networks))
        views = [
            augment.training_batch(images, index_B, augment_key, data, first + k)
            for k in range(len(state.networks))
        ]
        pixels, (_, labels, mixed) = jnp.stack([view[0] for view in views]), views[0]
    else:
        pixels, labels, mixed = augment.training_batch(images, index_B, augment_key, data)
    updated, values = update(cohort, state, pixels, labels, dropout_key, mixed)
    ok = metrics.finite(values)
    skipped = dataclasses.replace(state, step=updated.step)
    state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), updated, skipped)
    return state, metrics.add(sums, values, ok, updated.step)


def eval_step(
    cohort: Cohort,
    networks: tuple[NetworkState, ...],
    pixels_BxHxWxC: jax.Array,
    labels_B: jax.Array,
    mask_B: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns sums over the masked global batch, and outputs of this device's images.

    Sums, of each network and, last, the ensemble: cross_entropy [K + 1], metrics.prediction_counts
    of K + 1, and images, int32 [C]: the number of each class; error_products [K, K], if the method
    needs them. Outputs: label [B], -1 where the mask is False, predicted [B, K + 1], the class, and
    confidence [B, K + 1], its probability. The ensemble is the mean of the probabilities. Norms use
    the running statistics.

    Args:
      cohort: this device's part (Cohort.local).
      pixels_BxHxWxC: standardised images, this device's shard of the batch.
      mask_B: bool; False leaves an image out of every sum.
    """
    ring = cohort.ring
    log_p = [
        jax.nn.log_softmax(evaluated(module, state.variables(), pixels_BxHxWxC)[0])
        for module, state in zip(cohort.networks, networks, strict=True)
    ]
    log_p_KxBxC = jnp.stack(log_p)
    ensemble_BxC = ring.logsumexp(log_p_KxBxC) - jnp.log(len(ring.order))

    def sums(log_p_KxBxC: jax.Array) -> dict[str, jax.Array]:
        entropy_KxB = jnp.where(mask_B[None], losses.cross_entropy(log_p_KxBxC, labels_B), 0.0)
        counts = metrics.prediction_counts(log_p_KxBxC, labels_B, mask_B)
        return counts | {'cross_entropy': entropy_KxB.sum(1)}

    def outputs(log_p_KxBxC: jax.Array) -> dict[str, jax.Array]:
        return {
            'predicted': log_p_KxBxC.argmax(-1).astype(jnp.int32),
            'confidence': jnp.exp(log_p_KxBxC.max(-1)),
        }

    def of_all(function: Callable[[jax.Array], dict[str, jax.Array]]) -> dict[str, jax.Array]:
        own, ensemble = ring.gathered(function(log_p_KxBxC)), function(ensemble_BxC[None])
        return {name: jnp.concatenate([own[name], ensemble[name]]) for name in own}

    total = of_all(sums)
    if cohort.method.held_out:
        total['error_products'] = error_products(log_p_KxBxC, labels_B, mask_B)
    images_C = jnp.zeros(log_p_KxBxC.shape[-1], jnp.int32).at[labels_B].add(mask_B)
    by_image = jax.tree.map(jnp.transpose, of_all(outputs))
    by_image['label'] = jnp.where(mask_B, labels_B, -1)
    return jax.lax.psum(total | {'images': images_C}, DATA), by_image
