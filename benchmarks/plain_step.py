"""A second derivation of the training step: losses written out, jax.grad of each, plain optimizers.

Tests compare it with afkd_jax/method/step.py in double precision, benchmarks/accelerator.py the
step of an accelerator.
"""

import jax
import jax.numpy as jnp


def plain_log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))


def plain_forward(cohort, k, params, stats, images):
    params = {'trunk': params['trunk'], 'head': params['head']}
    variables = {'params': params, 'batch_stats': stats}
    return cohort.networks[k].apply(variables, images, True, mutable=['batch_stats'])


def plain_map(cohort, k, transfer, stats, own_map):
    if cohort.transfers[k] is None:
        return own_map, None
    variables = {'params': transfer, 'batch_stats': stats}
    mapped, new = cohort.transfers[k].apply(variables, own_map, True, mutable=['batch_stats'])
    return mapped, new.get('batch_stats', {})


def plain_discriminator(cohort, k, params, maps):
    return cohort.discriminators[k].apply({'params': params}, maps, mutable=['batch_stats'])[0]


def plain_adam(gradient, params, m, v, t, rate):
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, gradient)

    def move(p, m, v):
        return p - rate * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)

    return jax.tree.map(move, params, m, v), m, v


def plain_sgd(gradient, params, velocity, rate, momentum, decay):
    velocity = jax.tree.map(
        lambda v, g, p: momentum * v + g + decay * p, velocity, gradient, params
    )
    return jax.tree.map(lambda p, v: p - rate * v, params, velocity), velocity


def plain_step(cohort, logit_teachers, map_teachers, maps_learn, loss, memory, images, labels, t):
    """Returns (memory, losses) after step t, counted from 1; per network a plain dict.

    Args:
      cohort: its modules.
      logit_teachers: per network the list of its teachers.
      map_teachers: per network one teacher.
      maps_learn: 'nothing', 'l1' or 'adversarial'.
      loss: temperature, weights, smoothing and learning rates of this step.
      memory: before the step.
      images: standardised.
      labels: integers.
      t: of the step.
    """
    seen = []
    for k, own in enumerate(memory):
        (logits, own_map), new = plain_forward(cohort, k, own['params'], own['stats'], images)
        transfer = own['params']['transfer']
        mapped, mapped_stats = plain_map(cohort, k, transfer, own['transfer_stats'], own_map)
        seen.append((logits, mapped, new['batch_stats'], mapped_stats))
    result, losses = [], []
    for k, own in enumerate(memory):
        teacher_map = seen[map_teachers[k]][1]

        def transferred(params, k=k, own=own):
            (z, own_map), _ = plain_forward(cohort, k, params, own['stats'], images)
            stats = own['transfer_stats']
            return z, plain_map(cohort, k, params['transfer'], stats, own_map)[0]

        def logit_loss(params, k=k, transferred=transferred, teacher_map=teacher_map):
            z, mapped = transferred(params)
            log_p, classes = plain_log_softmax(z), z.shape[-1]
            target = jnp.eye(classes)[labels] * (1 - loss['smoothing'])
            total = -((target + loss['smoothing'] / classes) * log_p).sum(-1).mean()
            for teacher in logit_teachers[k]:
                log_q = plain_log_softmax(seen[teacher][0] / loss['temperature'])
                log_p = plain_log_softmax(z / loss['temperature'])
                kl = (jnp.exp(log_q) * (log_q - log_p)).sum(-1).mean()
                weight = loss['kl_weight'] * loss['temperature'] ** 2
                total += weight * kl / len(logit_teachers[k])
            if maps_learn == 'l1':
                total += loss['map_weight'] * jnp.abs(mapped - teacher_map).mean()
            return total

        def map_loss(moved, k=k, own=own, transferred=transferred):
            _, mapped = transferred({**own['params'], **moved})
            return (
                loss['adversarial_weight']
                * ((1 - plain_discriminator(cohort, k, own['discriminator'], mapped)) ** 2).mean()
            )

        def discriminator_loss(discriminator, k=k, own_map=seen[k][1], teacher_map=teacher_map):
            real = plain_discriminator(cohort, k, discriminator, teacher_map)
            fake = plain_discriminator(cohort, k, discriminator, own_map)
            return ((1 - real) ** 2).mean() + (fake**2).mean()

        new, values = {'stats': seen[k][2], 'transfer_stats': seen[k][3]}, {}
        start = own['params']
        by_logit = start if maps_learn == 'l1' else {**start, 'transfer': None}
        values['logit'], gradient = jax.value_and_grad(
            lambda p, start=start: logit_loss({**start, **p})
        )({name: part for name, part in by_logit.items() if part is not None})
        updated = {name: start[name] for name in gradient}
        updated, new['velocity'] = plain_sgd(
            gradient, updated, own['velocity'], loss['logit_rate'], 0.9, 1e-4
        )
        params = {**start, **updated}
        if maps_learn == 'adversarial':
            moved = {name: start[name] for name in ('trunk', 'transfer')}
            values['feature'], gradient = jax.value_and_grad(map_loss)(moved)
            moved = {name: params[name] for name in ('trunk', 'transfer')}
            moved, new['m'], new['v'] = plain_adam(
                gradient, moved, own['m'], own['v'], t, loss['feature_rate']
            )
            params = {**params, **moved}
            values['discriminator'], gradient = jax.value_and_grad(discriminator_loss)(
                own['discriminator']
            )
            new['discriminator'], new['dm'], new['dv'] = plain_adam(
                gradient,
                own['discriminator'],
                own['dm'],
                own['dv'],
                t,
                loss['discriminator_rate'],
            )
        result.append({'params': params, **new})
        losses.append(values)
    return result, losses


def as_memory(state):
    """Returns the arrays of a state under the names of plain_step."""
    memory = []
    for k, network in enumerate(state.networks):
        entry = {
            'params': network.params,
            'stats': network.batch_stats['network'],
            'transfer_stats': network.batch_stats['transfer'],
            'velocity': {
                name: part
                for name, part in network.opt['logit'][1].trace.items()
                if part is not None
            },
        }
        if state.discriminators:
            discriminator, adam = state.discriminators[k], network.opt['feature'][1]
            entry |= {'discriminator': discriminator.params, 'm': adam.mu, 'v': adam.nu}
            entry |= {'dm': discriminator.opt[1].mu, 'dv': discriminator.opt[1].nu}
        memory.append(entry)
    return memory
