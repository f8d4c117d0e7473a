"""--mode describe: what a config would train, without training, images or a device."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from afkd_jax import config as config_lib
from afkd_jax.command import Command
from afkd_jax.config import Config, steps_in
from afkd_jax.data import dataset
from afkd_jax.devices.arrays import scalar_count
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.method import optim
from afkd_jax.method import state as state_lib
from afkd_jax.method.objective import Objective
from afkd_jax.report import summary
from afkd_jax.report.console import log, print_json, working
from afkd_jax.report.tables import shape
from afkd_jax.tools.flops import multiply_adds


def describe(config: Config) -> dict[str, Any]:
    """Returns the facts of a config, as JSON; `networks` and `ensemble` as in summary.json.

    Raises:
      UserError: method, networks or data set do not fit.
    """
    info = dataset.info(config)
    cohort = cohort_lib.assemble(config, info.image_shape, info.num_classes, info.train)
    state, ring = state_lib.abstract(cohort), cohort.ring
    networks, ensemble = summary.entries(cohort)
    places = dict(zip(cohort.names, range(len(cohort.names)), strict=True))
    costs = {
        name: _forward_cost(cohort.networks[k], state.networks[k].variables(), cohort.image_shape)
        for name, k in places.items()
    }
    for k, entry in enumerate(networks):
        module, own = cohort.networks[k], state.networks[k]
        learns = cohort.learns(k)
        hops = cohort.method.hops(len(networks))
        teachers: list[Any] = [cohort.method.logits]  # a registered one, by its name
        if hops is not None:
            teachers = [ring.teacher_of(k, hop) + 1 for hop in hops]
        entry |= {
            'stem': getattr(module.trunk, 'stem', ''),
            'multiply_adds': costs[entry['name']],
            'logit_teachers': teachers if learns else [],
            'map_teacher': ring.teacher_of(k) + 1 if cohort.shared_map and learns else None,
            'transfer': None,
            'discriminator': None,
        }
        if cohort.shared_map and own.params['transfer'] is not None:
            entry['transfer'] = {
                'parameters': scalar_count(own.params['transfer']),
                'feature_map': list(cohort.shared_map),
            }
        if state.discriminators and (discriminator := state.discriminators[k]):
            parameters = scalar_count(discriminator.params)
            entry['discriminator'] = {'parameters': parameters}
    return {
        'method': config.method,
        'dataset': config.dataset,
        'image_shape': list(info.image_shape),
        'num_classes': info.num_classes,
        'images': {'train': info.train, 'validation': info.validation, 'test': info.test},
        'networks': networks,
        'ensemble': ensemble,
        'steps': steps_in(config.epochs, info.train, config.batch_size),
        'epochs': config.epochs,
        'batch_size': config.batch_size,
        'teacher': config.teacher,
        'compared_maps': [list(each) for each in cohort.shared_shapes],
        'ema_decay': config.ema.decay,
        'auxiliary': _auxiliary(cohort, state),
        'loss': _weights(cohort.objective),
        'adversary': _adversary(config, cohort) if cohort.method.adversarial else None,
        'optimizers': {
            name: dict(rule.facts) | _schedule(rule)
            for name, rule in cohort.optimizers.used().items()
        },
    }


def _auxiliary(cohort: cohort_lib.Cohort, state: state_lib.TrainState) -> dict[str, Any] | None:
    """Returns the facts of the auxiliary module; None if the method has none."""
    if not state.auxiliary:
        return None
    kind = type(cohort.auxiliary).__name__.lower()
    return {'kind': kind, 'parameters': scalar_count(state.auxiliary.params)}


def _forward_cost(network: Any, variables: Any, image_shape: tuple[int, ...]) -> int:
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return multiply_adds(lambda v, x: network.apply(v, x, False), variables, image)


def _schedule(rule: optim.Optimizer) -> dict[str, Any]:
    schedule, own = rule.schedule, rule.per_network
    facts: dict[str, Any] = {
        'schedule': schedule.kind,
        'learning_rate': schedule.initial,
        'changes': [{'step': step, 'factor': factor} for step, factor in schedule.changes],
        'steps': schedule.steps,
    }
    if schedule.warm_up:
        facts['warm_up_steps'] = schedule.warm_up
    if own:
        facts['learning_rates'] = [one.schedule.initial for one in own]
        facts['weight_decays'] = [dict(one.facts)['weight_decay'] for one in own]
    return facts


def _adversary(config: Config, cohort: cohort_lib.Cohort) -> dict[str, Any]:
    """Returns the adversary's switches, as they are set."""
    optimizer = {field.name for field in dataclasses.fields(config_lib.Optimizer)}
    own = dataclasses.asdict(config.discriminator) | dataclasses.asdict(config.adversarial)
    own['width'] = own['width'] or max(channels for _, _, channels in cohort.shared_shapes)
    own['warm_up_steps'] = cohort.objective.adversarial_ramp_steps
    return {name: own[name] for name in own if name not in {*optimizer, 'warm_up'}}


def _weights(objective: Objective) -> dict[str, float]:
    """Returns the settings of the losses that the method has."""
    method, loss = objective.method, objective.loss
    weights: dict[str, float] = {'label_smoothing': loss.label_smoothing}
    if method.logits != 'nobody':
        weights |= {'temperature': loss.temperature, 'kl_weight': loss.kl_weight}
        weights['kl_ramp_steps'] = objective.kl_ramp_steps
    if method.adversarial:
        weights['adversarial_weight'] = loss.adversarial_weight
    if method.map_loss:
        weights['map_weight'] = loss.map_weight
    return weights


def text(facts: dict[str, Any]) -> str:
    """Returns the facts as lines for a reader."""
    images = ', '.join(f'{count:,} {split}' for split, count in facts['images'].items())
    lines = [
        f'{facts["dataset"]}: {shape(facts["image_shape"])}, {facts["num_classes"]} classes; '
        f'{images}',
        f'method {facts["method"]}, {facts["epochs"]} epochs, {facts["steps"]:,} steps of batch '
        f'{facts["batch_size"]}',
        '',
    ]
    for k, row in enumerate(facts['networks'], start=1):
        lines.append(
            f'network {k}: {row["name"]}, {row["parameters"]:,} parameters, '
            f'{row["multiply_adds"]:,} multiply-adds per image, map {shape(row["feature_map"])}'
            + (', frozen' if row['frozen'] else '')
        )
        if row['stem']:
            lines.append(f'  stem: {row["stem"]}')
        if transfer := row['transfer']:
            lines.append(
                f'  transfer layer to {shape(transfer["feature_map"])}, '
                f'{transfer["parameters"]:,} parameters'
            )
        if discriminator := row['discriminator']:
            lines.append(f'  discriminator, {discriminator["parameters"]:,} parameters')
    if len(facts['compared_maps']) > 1:
        lines.append(f'maps of stages: {", ".join(map(shape, facts["compared_maps"]))}')
    if decay := facts['ema_decay']:
        use = ', and teaches' if facts['teacher'] == 'ema' else ''
        lines.append(f'an average of each network, with decay up to {decay:g}, is evaluated{use}')
    auxiliary = facts['auxiliary']
    if auxiliary and not auxiliary['parameters']:
        lines.append('weights of the networks are set after each evaluation on validation images')
    elif auxiliary:
        lines.append(
            f'auxiliary module: {auxiliary["kind"]}, {auxiliary["parameters"]:,} parameters, '
            'updated by the logit optimizer, not exported'
        )
    weights = ', '.join(f'{name} {value:,g}' for name, value in facts['loss'].items())
    lines += ['', *_ring_lines(facts['networks']), f'loss: {weights}']
    if facts['adversary']:
        words = (f'{name} {value}' for name, value in facts['adversary'].items())
        lines.append(f'adversary: {", ".join(words)}')
    lines.append('')
    for name, rule in facts['optimizers'].items():
        lines.append(f'{name} optimizer: {_schedule_words(rule)}')
    return '\n'.join(lines)


def _ring_lines(rows: list[dict[str, Any]]) -> list[str]:
    names: dict[Any, str] = {k: f'{k} ({row["name"]})' for k, row in enumerate(rows, start=1)}
    lines = []
    for k, row in enumerate(rows, start=1):
        sources = []
        if row['logit_teachers']:
            teachers = [names.get(teacher, f'"{teacher}"') for teacher in row['logit_teachers']]
            sources.append('logits of ' + ', '.join(teachers))
        if row['map_teacher']:
            sources.append(f'maps of {names[row["map_teacher"]]}')
        if sources:
            lines.append(f'network {names[k]} learns from the ' + ', and from the '.join(sources))
    return lines or ['no network teaches another']


def _schedule_words(rule: dict[str, Any]) -> str:
    def numbers(name: str) -> str:
        values = rule.get(f'{name}s') or [rule[name]]
        values = values if len(set(values)) > 1 else values[:1]
        return f'{name.replace("_", " ")} {" and ".join(f"{value:g}" for value in values)}'

    words = [rule['rule']]
    if 'momentum' in rule:
        words.append(f'momentum {rule["momentum"]:g}')
    if 'nesterov' in rule:
        words.append('nesterov')
    if 'clip_norm' in rule:
        words.append(f'gradients clipped to norm {rule["clip_norm"]:g}')
    kernels = ' on kernels only' if 'decay_all' in rule else ''
    words += [numbers('weight_decay') + kernels, numbers('learning_rate')]
    if 'warm_up_steps' in rule:
        words.append(f'warm-up of {rule["warm_up_steps"]:,} steps')
    if 'accumulate' in rule:
        words.append(f'gradients averaged over {rule["accumulate"]} steps')
    if rule['schedule'] == 'cosine':
        words.append(f'along a cosine to 0 at step {rule["steps"]:,}')
    else:
        words += [f'x{change["factor"]:g} at step {change["step"]:,}' for change in rule['changes']]
    return ', '.join(words)


def main(command: Command, _: object) -> int:
    """Prints the facts, or them as JSON; returns the exit code."""
    with working('reading the config'):
        facts = describe(command.config)
    log(text(facts))
    print_json(facts)
    return 0
