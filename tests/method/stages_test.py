"""Maps of several stages: their losses, discriminators and transfer layers."""

import jax
import numpy as np
import pytest
from conftest import (
    as_float64,
    initial_state,
    mapped_update,
    random_batch,
    relative_difference,
    take_devices,
    tiny_cohort,
    tiny_config,
)

from afkd_jax import models
from afkd_jax.errors import UserError
from afkd_jax.method.cohort import _stage_shapes

MIXED = ('staged-4', 'staged-6')
FIELDS = {'batch_size': 8, 'epochs': 4, 'stages': 2}


def one_step(networks, **fields):
    config = tiny_config(networks, **FIELDS | fields)
    devices = take_devices(1)
    state = as_float64(initial_state(config))
    batch = as_float64(random_batch(8))
    step = mapped_update(config, devices)
    after, values = step(devices.replicate(state), *map(devices.split, batch))
    return tiny_cohort(config), state, batch, *jax.device_get((after, values))


def maps_of(cohort, k, state, params, images):
    """Returns a network's maps after the transfer layers, a tuple."""
    variables = {
        'params': {part: params[part] for part in ('trunk', 'head')},
        'batch_stats': state.networks[k].batch_stats['network'],
    }
    (_, maps), _ = cohort.networks[k].apply(variables, images, True, mutable=['batch_stats'])
    found = []
    for stage, own in enumerate(maps):
        layer = cohort.transfers[k] and cohort.transfers[k].stages[stage]
        if layer:
            name = f'stages_{stage}'
            variables = {
                'params': params['transfer'][name],
                'batch_stats': state.networks[k].batch_stats['transfer'][name],
            }
            own, _ = layer.apply(variables, own, True, mutable=['batch_stats'])
        found.append(own)
    return found


def test_each_stage_has_its_discriminator_and_losses_are_means_over_stages(x64):
    cohort, state, (images, _), after, values = one_step(MIXED, method='adversarial')
    assert cohort.shared_shapes == ((4, 4, 6), (2, 2, 12))
    for k in range(2):
        teacher = maps_of(cohort, 1 - k, state, state.networks[1 - k].params, images)

        def output(params, stage, own, k=k):
            module, variables = cohort.discriminators[k], {'params': params[stage]}
            return module.apply(variables, own, mutable=['batch_stats'])[0]

        def generator(params, k=k, output=output):
            own, learned = maps_of(cohort, k, state, params, images), state.discriminators[k].params
            return sum(((1 - output(learned, s, own[s])) ** 2).mean() for s in (0, 1)) / 2

        def discriminator(params, k=k, output=output, teacher=teacher):
            own = maps_of(cohort, k, state, state.networks[k].params, images)
            real = [(1 - output(params, s, teacher[s])) ** 2 for s in (0, 1)]
            fake = [output(params, s, own[s]) ** 2 for s in (0, 1)]
            return sum((a + b).mean() for a, b in zip(real, fake, strict=True))

        loss, gradient = jax.jit(jax.value_and_grad(generator))(state.networks[k].params)
        assert values['adversarial'][k] == pytest.approx(loss)
        moment = after.networks[k].opt['feature'][1].mu  # 0.1 times the gradient, by Adam
        expected = {part: gradient[part] for part in ('trunk', 'transfer')}
        assert relative_difference(moment, jax.tree.map(lambda g: 0.1 * g, expected))[0] < 1e-9
        loss, gradient = jax.jit(jax.value_and_grad(discriminator))(state.discriminators[k].params)
        assert values['discriminator'][k] == pytest.approx(loss / 2)
        moment = after.discriminators[k].opt[1].mu
        assert relative_difference(moment, jax.tree.map(lambda g: 0.1 * g, gradient))[0] < 1e-9


def test_a_loss_between_maps_is_the_mean_over_stages(x64):
    cohort, state, (images, _), _, values = one_step(MIXED, method='l1')
    own, other = (maps_of(cohort, k, state, state.networks[k].params, images) for k in (0, 1))
    expected = [np.abs(a - b).mean() for a, b in zip(own, other, strict=True)]
    assert values['l1'] == pytest.approx(2 * [np.mean(expected)])
    assert expected[0] != pytest.approx(expected[1], rel=1e-2)


def test_one_stage_is_the_feature_map():
    config = tiny_config(MIXED, method='afd')
    cohort, state = tiny_cohort(config), initial_state(config)
    assert cohort.shared_shapes == ((2, 2, 12),)
    assert 'Conv_0' in state.discriminators[0].params
    both = initial_state(config.replace(stages=2))
    assert (
        relative_difference(both.discriminators[0].params[1], state.discriminators[0].params)[0]
        == 0
    )


@pytest.mark.parametrize(
    ('networks', 'fields', 'message'),
    [
        (MIXED, {'stages': 3}, r'stages: must be at most 2, the stages of which "staged-4"'),
        (('staged-4', 'tiny-8-2'), {}, r'stages: must be at most 1, .* "tiny-8-2"'),
        (MIXED, {'method': 'one+adversarial'}, r'stages: must be 1 with the method "one"'),
        (MIXED, {'adversarial__balance': 'gradnorm'}, 'stages: must be 1 with adversarial.balance'),
    ],
)
def test_wrong_stages(networks, fields, message):
    with pytest.raises(UserError, match=message):
        tiny_cohort(tiny_config(networks, **{'stages': 2, 'method': 'afd'} | fields))


@pytest.mark.parametrize(
    ('name', 'shapes'),
    [
        ('resnet8', [(32, 32, 16), (16, 16, 32), (8, 8, 64)]),
        ('resnet18', [(32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512)]),
        ('wrn-16-2', [(32, 32, 32), (16, 16, 64), (8, 8, 128)]),
        ('vgg8', [(32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512), (4, 4, 512)]),
        ('densenet-40-12', [(32, 32, 96), (16, 16, 120), (8, 8, 132)]),
        ('shufflenet_v2x0.5', [(16, 16, 48), (8, 8, 96), (4, 4, 1024)]),
        (
            'mobilenet_v2x0.5',
            [
                *((32, 32, 8), (32, 32, 16), (16, 16, 16), (8, 8, 32), (8, 8, 48), (4, 4, 80)),
                (4, 4, 1280),
            ],
        ),
    ],
)
def test_the_stages_of_every_family(name, shapes):
    network = models.build(name, 10, (32, 32, 3))
    found = _stage_shapes(network, (32, 32, 3))  # pyright: ignore - modules hash by fields
    assert list(found) == shapes
