"""Who updates what: the training step and the evaluation step of one device, pure.

One forward pass of every network gives (logits, map). Two losses are pulled back through that
one pass, and all gradients are taken at the step's starting parameters; then the updates are
applied in the order logit, feature, discriminator. So the step is a pure function of (state,
batch, key), and a discriminator's pass over the own map serves both losses that need it.
Source: separate optimizers and the single pass are told by a third party; the discriminator's
place in the order is our choice.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from afkd_jax import losses, metrics, ring
from afkd_jax.cohort import Cohort
from afkd_jax.data import augment
from afkd_jax.parallel import AXIS, varying
from afkd_jax.state import DiscriminatorState, NetworkState, TrainState


def value_shapes(cohort: Cohort) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the values that a step of this cohort reports.

    One per network, [K]: cross_entropy and mimicry_kl (with its T^2) add up to the logit loss;
    accuracy is in percent; adversarial is L_G and discriminator L_D; d_own and d_teacher are the
    discriminator's mean outputs on own ("fake") and teacher's ("real") maps; grad_norm_* are the
    L2 norms of the three gradients. One per step: learning_rate_*, of each optimizer.
    """
    names = ['cross_entropy', 'accuracy', 'grad_norm_logit']
    if cohort.method.logits == 'ring':
        names += ['mimicry_kl']
    if cohort.adversarial:
        names += ['adversarial', 'discriminator', 'd_own', 'd_teacher']
        names += ['grad_norm_feature', 'grad_norm_discriminator']
    shapes = dict.fromkeys(names, (len(cohort.names),))
    return shapes | {f'learning_rate_{name}': () for name in cohort.optimizers.used()}


def _forward(module: Any, params: Any, batch_stats: Any, inputs: jax.Array) -> tuple:
    """Returns (outputs, pullback to (params, inputs), new batch statistics), in training mode."""

    def apply(params, inputs):
        variables = {'params': params, 'batch_stats': batch_stats}
        return module.apply(variables, inputs, True, mutable=['batch_stats'])

    outputs, pullback, updated = jax.vjp(apply, varying(params), inputs, has_aux=True)
    return outputs, pullback, updated['batch_stats']


def _learn_from_logits(
    cohort: Cohort, logits_KxBxC: jax.Array, labels_B: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the gradient of every network's logit loss to its logits, and the values [K].

    L_logit_k = CE(y, z_k) + T^2 KL(softmax(z_p / T) || softmax(z_k / T)), p the teacher of k.
    The sum over k has the same gradients, as no loss reaches another network's logits.
    """

    def loss(logits_KxBxC):
        parts = {'cross_entropy': losses.cross_entropy(logits_KxBxC, labels_B).mean(1)}
        if cohort.method.logits == 'ring':
            kl_KxB = losses.mimicry_kl(
                logits_KxBxC, ring.teachers(logits_KxBxC), cohort.temperature
            )
            parts['mimicry_kl'] = kl_KxB.mean(1)
        return sum(parts.values()).sum(), parts

    return jax.grad(loss, has_aux=True)(logits_KxBxC)


def _learn_from_maps(
    cohort: Cohort, discriminators: tuple[DiscriminatorState, ...], maps_KxBxHxWxC: jax.Array
) -> tuple[jax.Array, list, dict[str, jax.Array]]:
    """Returns gradients of L_G to the maps and of L_D to each discriminator, and values [K].

    Each discriminator sees the own map once and the teacher's map once. The own pass is pulled
    back twice: with L_G's cotangent to the map, with L_D's to the discriminator.
    """
    teacher_maps_KxBxHxWxC = ring.teachers(maps_KxBxHxWxC)
    map_gradients, gradients, parts = [], [], []
    for k, module in enumerate(cohort.discriminators):
        params = varying(discriminators[k].params)

        def judge(params, maps, module=module):
            return module.apply({'params': params}, maps, mutable=['batch_stats'])[0]

        d_own_B, pull_own = jax.vjp(judge, params, maps_KxBxHxWxC[k])
        d_teacher_B, pull_teacher = jax.vjp(judge, params, teacher_maps_KxBxHxWxC[k])

        adversarial, to_own_G = jax.value_and_grad(lambda d: losses.fool(d).mean())(d_own_B)
        discriminator, (to_own_D, to_teacher_D) = jax.value_and_grad(
            lambda own, teacher: losses.discern(own, teacher).mean(), argnums=(0, 1)
        )(d_own_B, d_teacher_B)

        _, to_map = pull_own(to_own_G)
        by_own, _ = pull_own(to_own_D)
        by_teacher, _ = pull_teacher(to_teacher_D)
        map_gradients.append(to_map)
        gradients.append(jax.tree.map(jnp.add, by_own, by_teacher))
        parts.append(
            {
                'adversarial': adversarial,
                'discriminator': discriminator,
                'd_own': d_own_B.mean(),
                'd_teacher': d_teacher_B.mean(),
            }
        )
    values = {name: jnp.stack([part[name] for part in parts]) for name in parts[0]}
    return jnp.stack(map_gradients), gradients, values


def _updated_network(
    cohort: Cohort, network: NetworkState, gradients: dict, batch_stats: Any, step: jax.Array
) -> NetworkState:
    """Returns the network after its logit update and then its feature update."""
    params, logit_opt = cohort.optimizers.logit.apply(
        gradients['logit'], network.logit_opt, network.params, step
    )
    network = network.replace(params=params, logit_opt=logit_opt, batch_stats=batch_stats)
    if not cohort.adversarial:
        return network
    moved, feature_opt = cohort.optimizers.feature.apply(
        gradients['feature'],
        network.feature_opt,
        {'trunk': params['trunk'], 'transfer': network.transfer},
        step,
    )
    return network.replace(
        params={**params, 'trunk': moved['trunk']},
        transfer=moved['transfer'],
        feature_opt=feature_opt,
    )


def update(
    cohort: Cohort, state: TrainState, images_BxHxWxC: jax.Array, labels_B: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after one step on this batch, and the step's values (value_shapes).

    Runs on one device, inside a mapped function: B is this device's share of the batch. Batch
    statistics, losses and gradients are over the global batch.

    Args:
      cohort: what is trained.
      state: before the step.
      images_BxHxWxC: standardised.
      labels_B: integers.
    """
    outputs, pullbacks, batch_stats = [], [], []
    for module, network in zip(cohort.networks, state.networks, strict=True):
        output, pullback, stats = _forward(
            module, network.params, network.batch_stats['network'], images_BxHxWxC
        )
        outputs.append(output)
        pullbacks.append(pullback)
        batch_stats.append({'network': stats, 'transfer': None})

    logits_KxBxC = jnp.stack([logits for logits, _ in outputs])
    to_logits_KxBxC, values = _learn_from_logits(cohort, logits_KxBxC, labels_B)
    values['accuracy'] = 100.0 * (logits_KxBxC.argmax(-1) == labels_B[None]).mean(1)
    gradients = []
    for k, (_, maps) in enumerate(outputs):
        to_params, _ = pullbacks[k]((to_logits_KxBxC[k], jnp.zeros_like(maps)))
        gradients.append({'logit': to_params})

    discriminator_gradients = []
    if cohort.adversarial:
        maps, transfer_pullbacks = [], []
        for k, network in enumerate(state.networks):
            transferred, pullback = outputs[k][1], None
            if cohort.transfers[k]:
                transferred, pullback, batch_stats[k]['transfer'] = _forward(
                    cohort.transfers[k],
                    network.transfer,
                    network.batch_stats['transfer'],
                    transferred,
                )
            maps.append(transferred)
            transfer_pullbacks.append(pullback)
        to_maps_KxBxHxWxC, discriminator_gradients, more = _learn_from_maps(
            cohort, state.discriminators, jnp.stack(maps)
        )
        values |= more
        for k, (logits, _) in enumerate(outputs):
            to_map, to_transfer = to_maps_KxBxHxWxC[k], None
            if transfer_pullbacks[k]:
                to_transfer, to_map = transfer_pullbacks[k](to_map)
            to_params, _ = pullbacks[k]((jnp.zeros_like(logits), to_map))
            gradients[k]['feature'] = {'trunk': to_params['trunk'], 'transfer': to_transfer}

    gradients, discriminator_gradients, values = jax.lax.pmean(
        (gradients, discriminator_gradients, values), AXIS
    )
    for kind in gradients[0]:
        values[f'grad_norm_{kind}'] = jnp.stack([optax.tree.norm(g[kind]) for g in gradients])
    if cohort.adversarial:
        norms = [optax.tree.norm(g) for g in discriminator_gradients]
        values['grad_norm_discriminator'] = jnp.stack(norms)

    for name, optimizer in cohort.optimizers.used().items():
        values[f'learning_rate_{name}'] = optimizer.schedule(state.step)

    networks = tuple(
        _updated_network(cohort, network, gradients[k], batch_stats[k], state.step)
        for k, network in enumerate(state.networks)
    )
    discriminators = tuple(
        DiscriminatorState(
            *cohort.optimizers.discriminator.apply(gradient, old.opt, old.params, state.step)
        )
        for gradient, old in zip(discriminator_gradients, state.discriminators, strict=True)
    )
    return TrainState(state.step + 1, networks, discriminators), values


def train_step(
    cohort: Cohort,
    pad: int,
    flip: bool,
    state: TrainState,
    sums: metrics.Sums,
    images: augment.Table,
    index_B: jax.Array,
    key: jax.Array,
) -> tuple[TrainState, metrics.Sums]:
    """Returns (state, sums) after gathering, varying and learning this device's batch.

    Args:
      cohort: what is trained.
      pad: see augment.vary.
      flip: see augment.vary.
      state: before the step.
      sums: of the steps since the last fetch.
      images: all images.
      index_B: this device's share of the batch's indices.
      key: of the run; what is random in a step is a function of (key, step).
    """
    step_key = jax.random.fold_in(key, state.step)
    batch = augment.training_batch(images, index_B, step_key, pad, flip)
    state, values = update(cohort, state, *batch)
    return state, metrics.add(sums, values)


def eval_step(
    cohort: Cohort,
    networks: tuple[NetworkState, ...],
    images: augment.Table,
    index_B: jax.Array,
    mask_B: jax.Array,
) -> dict[str, jax.Array]:
    """Returns sums over the masked global batch, each network's and, last, the ensemble's: [K + 1].

    Args:
      cohort: what is evaluated.
      networks: their states; the running batch statistics are used.
      images: all images.
      index_B: this device's share of the indices.
      mask_B: bool; False leaves an entry out of every sum.

    Returns:
      correct (int32) and cross_entropy sums. The ensemble is the mean of the probabilities.
    """
    pixels, labels_B = augment.evaluation_batch(images, index_B)
    log_p_KxBxC = jnp.stack(
        [
            jax.nn.log_softmax(
                module.apply(
                    {'params': state.params, 'batch_stats': state.batch_stats['network']},
                    pixels,
                    False,
                )[0]
            )
            for module, state in zip(cohort.networks, networks, strict=True)
        ]
    )
    ensemble_1xBxC = jax.nn.logsumexp(log_p_KxBxC, axis=0, keepdims=True) - jnp.log(
        len(cohort.networks)
    )
    log_p_KxBxC = jnp.concatenate([log_p_KxBxC, ensemble_1xBxC])
    correct_KxB = (log_p_KxBxC.argmax(-1) == labels_B[None]) & mask_B[None]
    entropy_KxB = jnp.where(mask_B[None], losses.cross_entropy(log_p_KxBxC, labels_B), 0.0)
    return jax.lax.psum(
        {'correct': correct_KxB.sum(1, dtype=jnp.int32), 'cross_entropy': entropy_KxB.sum(1)}, AXIS
    )
