"""Residual networks: published parameter counts, shapes, names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afkd_jax import models
from afkd_jax import state as state_lib
from afkd_jax.describe import multiply_adds
from afkd_jax.errors import UserError


@functools.cache
def abstract(name, num_classes, size=32, channels=3):
    network = models.build(name, num_classes)
    image = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    outputs, variables = jax.eval_shape(
        lambda k, x: network.init_with_output(k, x, False), key, image
    )
    return network, outputs, variables, image


@pytest.mark.parametrize(
    ('name', 'num_classes', 'count'),
    [
        # A: Y. Idelbayev's "Proper ResNet Implementation for CIFAR10/CIFAR100 in PyTorch".
        ('resnet20-A', 10, 269_722),
        ('resnet56-A', 10, 853_018),
        # B: the same networks with 1x1-convolution shortcuts, as in the distillation literature.
        ('resnet32', 10, 466_906),
        ('resnet20', 100, 278_324),
        ('resnet56', 100, 861_620),
    ],
)
def test_published_parameter_counts(name, num_classes, count):
    _, _, variables, _ = abstract(name, num_classes)
    assert state_lib.parameter_count(variables['params']) == count


def test_multiply_adds_by_hand():
    # resnet8-A, 8x8x1: stem 64*9*1*16; stage 1 2*64*9*16*16; stage 2 16*9*(16*32 + 32*32);
    # stage 3 4*9*(32*64 + 64*64); head 64*10.
    expected = 64 * 9 * 16 + 2 * 64 * 9 * 256 + 16 * 9 * 1536 + 4 * 9 * 6144 + 640
    network, _, variables, image = abstract('resnet8-A', 10, size=8, channels=1)
    image = jax.ShapeDtypeStruct((1, *image.shape[1:]), image.dtype)
    assert multiply_adds(lambda v, x: network.apply(v, x, False), variables, image) == expected


@pytest.mark.parametrize(('size', 'map_size'), [(8, 2), (28, 7), (32, 8), (33, 9)])
@pytest.mark.parametrize(('name', 'channels'), [('resnet8', 64), ('resnet8x2-A', 128)])
def test_shapes(name, channels, size, map_size):
    _, (logits, maps), _, _ = abstract(name, 7, size, 1)
    assert logits.shape == (2, 7)
    assert maps.shape == (2, map_size, map_size, channels)


def test_the_map_is_activated_and_feeds_the_classifier():
    network = models.build('resnet8', 5)
    images = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)
    variables = jax.jit(functools.partial(network.init, train=False))(jax.random.key(0), images)
    logits, maps = jax.jit(functools.partial(network.apply, train=False))(variables, images)
    assert maps.min() == 0
    assert maps.max() > 0
    head = variables['params']['head']['Dense_0']
    expected = np.asarray(maps).mean((1, 2)) @ head['kernel'] + head['bias'][None]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_he_initialisation():
    network = models.build('resnet20x2', 10)
    images = jnp.zeros((1, 8, 8, 3))
    variables = jax.jit(functools.partial(network.init, train=False))(jax.random.key(0), images)
    kernel = variables['params']['trunk']['stage3_block2']['conv1']['kernel']
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.02)
    assert abs(float(kernel.mean())) < 1e-3


def test_evaluation_leaves_the_batch_statistics_alone():
    network = models.build('resnet8', 5)
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 1)).astype(np.float32)
    variables = jax.jit(functools.partial(network.init, train=False))(jax.random.key(0), images)
    for train, changes in ((False, False), (True, True)):
        apply = jax.jit(functools.partial(network.apply, train=train, mutable=['batch_stats']))
        _, new = apply(variables, images)
        same = jax.tree.map(np.array_equal, new['batch_stats'], variables['batch_stats'])
        assert any(not leaf for leaf in jax.tree.leaves(same)) == changes


@pytest.mark.parametrize(
    ('name', 'sentence'),
    [
        ('resnet21', 'depth 21.*6n \\+ 2.*"resnet20" and "resnet26"'),
        ('resnet2', 'depth 2'),
        ('resnet8x0', 'width multiplier 0'),
        ('resnet32-C', 'no network is called "resnet32-C".*did you mean "resnet32"'),
        ('vgg', 'no network is called "vgg"'),
        ('', 'no network is called ""'),
    ],
)
def test_unknown_names_are_refused(name, sentence):
    with pytest.raises(UserError, match=f'config.networks: .*{sentence}'):
        models.build(name, 10)
