"""Registries: names, patterns and errors; a network and a loss between maps of one's own."""

import json
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import initial_state, mapped_update, random_batch, take_devices, tiny_config

from afkd_jax import registry
from afkd_jax.errors import UserError, nearest
from afkd_jax.models.layers import Layers
from afkd_jax.registry import MAP_LOSSES, NETWORKS, SOURCES, Registry
from afkd_jax.tools import describe

ROOT = pathlib.Path(__file__).parents[1]


def empty_registry():
    return Registry('networks', 'network', lambda: None)


def part(name):
    return name


def other_part(name):
    return name


def test_a_part_is_found_by_its_names_and_by_its_pattern():
    parts = empty_registry()
    parts.register('one', 'two')(part)
    parts.register(pattern=r'three-\d')(other_part)
    assert parts.names() == ['one', 'two']
    assert [parts.get(name) for name in ('one', 'two')] == [part] * 2
    assert parts.get('three-3') is other_part
    assert [parts.find(name) for name in ('three', 'three-33', 'a three-3', 'ones')] == [None] * 4


def test_a_name_precedes_the_pattern_of_another_part():
    parts = empty_registry()
    parts.register(pattern=r'.*')(part)
    parts.register('one')(other_part)
    assert parts.get('one') is other_part
    assert parts.get('two') is part


@pytest.mark.parametrize(
    ('parts', 'name', 'message'),
    [
        (NETWORKS, 'resnett20', 'config.networks: there is no network "resnett20"; '
            'did you mean "resnet20"?'),
        (NETWORKS, 'x', 'config.networks: there is no network "x"; valid: densenet-100-12, '),
        (MAP_LOSSES, 'l11', 'config.method: there is no loss between maps "l11"; '
            'did you mean "l1"?'),
        (SOURCES, 'digit', 'config.dataset: there is no source "digit"; did you mean "digits"?'),
    ],
)  # fmt: skip
def test_an_unknown_name_is_rejected_with_the_nearest(parts, name, message):
    with pytest.raises(UserError) as error:
        parts.get(name)
    assert str(error.value).startswith(message)
    assert '\n' not in str(error.value)
    assert parts.find(name) is None


def test_a_long_list_of_valid_names_is_cut():
    assert nearest('x', map(str, range(10, 70))).endswith('48, 49, ... (60 in all)')
    assert nearest('x', map(str, range(10, 50))).endswith('48, 49')


def test_a_name_that_is_registered_twice_is_rejected():
    parts = empty_registry()
    parts.register('one')(part)
    with pytest.raises(UserError, match='network "one": registered twice, by registry_test and by'):
        parts.register('one')(other_part)
    assert parts.get('one') is part


def test_the_same_part_may_be_registered_again():
    # As by a config file that is loaded twice: another object of the same module and name.
    parts = empty_registry()
    parts.register('one')(part)
    again = type(part)(part.__code__, part.__globals__, part.__name__)
    parts.register('one')(again)
    assert parts.get('one') is again


@pytest.mark.parametrize('name', ['resnet20', 'wrn-16-2'])
def test_the_name_of_a_built_in_network_is_taken(name):
    NETWORKS.names()  # those are registered when they are first needed
    with pytest.raises(UserError, match=f'network "{name}": registered twice, by afkd_jax.models'):
        registry.register_network(name)(part)


class Own(nn.Module):
    layers: Layers
    stem: str = 'conv 5x5'

    @nn.compact
    def __call__(self, images, train):
        return nn.relu(self.layers.conv(5, (5, 5), 2, padding=2)(images))


@pytest.fixture
def own_parts(monkeypatch):
    """A network 'own' and a loss between maps 'cubed', until the end of the test."""
    for parts in (NETWORKS, MAP_LOSSES):
        parts.names()  # registers the built-in ones first
        monkeypatch.setattr(parts, '_parts', dict(parts._parts))
        monkeypatch.setattr(parts, '_patterns', list(parts._patterns))

    @registry.register_network('own')
    def own(name, layers, large):
        return Own(layers)

    @registry.register_map_loss('cubed')
    def cubed(maps, teacher_maps):
        return (jnp.abs(maps - teacher_maps) ** 3).mean((-3, -2, -1))


def test_own_parts_are_described(own_parts):
    facts = describe.describe(tiny_config(('own', 'tiny-8-2'), method='ring+cubed'))
    own, tiny = facts['networks']
    assert (own['name'], own['stem'], own['feature_map']) == ('own', 'conv 5x5', [4, 4, 5])
    assert own['parameters'] == 5 * 5 * 5 + 5 * 10 + 10
    assert own['transfer'] == {'parameters': 5 * 8 + 16, 'feature_map': [4, 4, 8]}
    assert [own['map_teacher'], tiny['map_teacher']] == [2, 1]
    assert facts['loss']['map_weight'] == 1.0
    json.dumps(facts)


def test_own_parts_are_trained(own_parts):
    config = tiny_config(('own', 'own'), method='nobody+cubed', batch_size=8, loss__map_weight=0.5)
    devices, state = take_devices(1), initial_state(config)
    images, labels = random_batch(8)
    batch = devices.split(images), devices.split(labels)
    after, values = mapped_update(config, devices)(devices.replicate(state), *batch)
    kernels = [network.params['trunk']['Conv_0']['kernel'] for network in state.networks]
    maps = [
        nn.relu(jax.lax.conv_general_dilated(
            images, kernel, (2, 2), [(2, 2)] * 2, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        ))
        for kernel in kernels
    ]  # fmt: skip
    expected = (np.abs(np.subtract(*map(np.asarray, maps))) ** 3).mean()
    np.testing.assert_allclose(values['cubed'], [expected] * 2, rtol=1e-4)
    for old, network in zip(kernels, jax.device_get(after).networks, strict=True):
        assert not np.array_equal(old, network.params['trunk']['Conv_0']['kernel'])


def test_without_a_registration_own_parts_are_rejected():
    for fields in ({'networks': ('own', 'tiny-8-2')}, {'method': 'ring+cubed'}):
        with pytest.raises(
            UserError, match=r'config\.(networks: .* "own"|method: .* "ring\+cubed)'
        ):
            describe.describe(tiny_config(**fields))


PROGRAM = """
import sys
import afkd_jax

@afkd_jax.register_network('own')
def own(name, layers, large):
    return None

afkd_jax.Config.of(afkd_jax.default_config('own,own'))
assert 'jax' not in sys.modules, 'JAX is imported'
assert 'flax' not in sys.modules, 'Flax is imported'
assert callable(afkd_jax.build_network)
assert 'jax' in sys.modules
assert all(hasattr(afkd_jax, name) for name in afkd_jax.__all__)
"""


def test_importing_the_package_and_registering_imports_no_jax():
    command = [sys.executable, '-c', PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
