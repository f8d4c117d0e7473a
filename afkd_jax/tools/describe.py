"""--mode describe: what a config would train, without training, data or a device."""

import math
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from ml_collections import ConfigDict

from afkd_jax import config as config_lib
from afkd_jax.data import dataset as sources
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.method import optim
from afkd_jax.method import state as state_lib
from afkd_jax.method.objective import Objective
from afkd_jax.report import summary


def multiply_adds(function: Any, *arguments: Any) -> int:
    """Returns the multiply-adds of a function's convolutions and matrix products.

    Counted in its jaxpr by formula; element-wise work, norms and pooling do not count, as in the
    literature. The taps that fall on padding do count.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        outputs = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == 'conv_general_dilated':
            kernel = equation.invars[1].aval.shape
            out_channels = kernel[equation.params['dimension_numbers'].rhs_spec[0]]
            total += outputs * math.prod(kernel) // out_channels
        elif equation.primitive.name == 'dot_general':
            (contracted, _), _ = equation.params['dimension_numbers']
            shape = equation.invars[0].aval.shape
            total += outputs * math.prod(shape[axis] for axis in contracted)
        total += sum(_count(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total


def _forward_cost(network: Any, variables: Any, image_shape: tuple[int, ...]) -> int:
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return multiply_adds(lambda v, x: network.apply(v, x, False), variables, image)


def _schedule(schedule: optim.Schedule) -> dict[str, Any]:
    return {
        'schedule': schedule.kind,
        'learning_rate': schedule.initial,
        'changes': [{'step': step, 'factor': factor} for step, factor in schedule.changes],
        'steps': schedule.steps,
    }


def _weights(objective: Objective) -> dict[str, float]:
    """Returns what scales the losses that the method has."""
    method, names = objective.method, ['label_smoothing']
    if method.logits != 'nobody':
        names += ['temperature', 'kl_weight', 'kl_ramp_steps']
    if method.maps != 'nothing':
        names += [f'{method.maps}_weight']
    return {name: getattr(objective, name) for name in names}


def describe(config: ConfigDict) -> dict[str, Any]:
    """Returns the facts of a valid config; `networks` and `ensemble` as in summary.json.

    Raises:
      UserError: method, networks or data set do not fit.
    """
    info = sources.info(config)
    cohort = cohort_lib.assemble(config, info.image_shape, info.num_classes, info.train)
    state, objective = state_lib.abstract(cohort), cohort.objective
    networks, ensemble = summary.entries(cohort)
    for k, entry in enumerate(networks):
        module, own = cohort.networks[k], state.networks[k]
        hops = objective.method.hops(len(networks))
        entry |= {
            'stem': module.trunk.stem,
            'multiply_adds': _forward_cost(module, own.variables(), cohort.image_shape),
            'logit_teachers': [objective.ring.teacher_of(k, hop) + 1 for hop in hops],
            'map_teacher': objective.ring.teacher_of(k) + 1 if cohort.maps_teach else None,
            'transfer': None,
            'discriminator': None,
        }
        if own.params['transfer'] is not None:
            entry['transfer'] = {
                'parameters': state_lib.parameter_count(own.params['transfer']),
                'feature_map': list(cohort.shared_map),
            }
        if cohort.adversarial:
            params = state.discriminators[k].params
            entry['discriminator'] = {'parameters': state_lib.parameter_count(params)}
    return {
        'method': config.method,
        'dataset': config.dataset,
        'image_shape': list(info.image_shape),
        'num_classes': info.num_classes,
        'images': {'train': info.train, 'validation': info.validation, 'test': info.test},
        'networks': networks,
        'ensemble': ensemble,
        'steps': config_lib.steps_in(config.epochs, info.train, config.batch_size),
        'epochs': config.epochs,
        'batch_size': config.batch_size,
        'loss': _weights(objective),
        'optimizers': {
            name: dict(rule.facts) | _schedule(rule.schedule)
            for name, rule in cohort.optimizers.used().items()
        },
    }


def text(facts: dict[str, Any]) -> str:
    """Returns the facts as lines for a reader."""
    images = ', '.join(f'{count:,} {split}' for split, count in facts['images'].items())
    shape = 'x'.join(map(str, facts['image_shape']))
    lines = [
        f'{facts["dataset"]}: {shape}, {facts["num_classes"]} classes; {images}',
        f'method {facts["method"]}, {facts["epochs"]} epochs, {facts["steps"]:,} steps of batch '
        f'{facts["batch_size"]}',
        '',
    ]
    for k, row in enumerate(facts['networks'], start=1):
        lines.append(
            f'network {k}: {row["name"]}, {row["parameters"]:,} parameters, '
            f'{row["multiply_adds"]:,} multiply-adds per image, map '
            + 'x'.join(map(str, row['feature_map']))
        )
        lines.append(f'  stem: {row["stem"]}')
        if row['transfer']:
            shape = 'x'.join(map(str, row['transfer']['feature_map']))
            parameters = row['transfer']['parameters']
            lines.append(f'  transfer layer to {shape}, {parameters:,} parameters')
        if row['discriminator']:
            lines.append(f'  discriminator, {row["discriminator"]["parameters"]:,} parameters')
    weights = ', '.join(f'{name} {value:,g}' for name, value in facts['loss'].items())
    lines += ['', *_ring_lines(facts), f'loss: {weights}', '']
    for name, rule in facts['optimizers'].items():
        lines.append(f'{name} optimizer: {_schedule_words(rule)}')
    return '\n'.join(lines)


def _ring_lines(facts: dict[str, Any]) -> list[str]:
    rows = facts['networks']

    def name(k: int) -> str:
        return f'{k} ({rows[k - 1]["name"]})'

    lines = []
    for k, row in enumerate(rows, start=1):
        lessons = []
        if row['logit_teachers']:
            lessons.append('logits of ' + ', '.join(map(name, row['logit_teachers'])))
        if row['map_teacher']:
            lessons.append(f'maps of {name(row["map_teacher"])}')
        if lessons:
            lines.append(f'network {name(k)} learns from the ' + ', and from the '.join(lessons))
    return lines or ['nobody teaches']


def _schedule_words(rule: dict[str, Any]) -> str:
    momentum = f' momentum {rule["momentum"]:g},' if 'momentum' in rule else ''
    words = f'{rule["rule"]},{momentum} weight decay {rule["weight_decay"]:g}, '
    words += f'learning rate {rule["learning_rate"]:g}'
    if rule['schedule'] == 'cosine':
        return f'{words}, along a cosine to 0 at step {rule["steps"]:,}'
    for change in rule['changes']:
        words += f', x{change["factor"]:g} at step {change["step"]:,}'
    return words
