"""Networks of every family: published parameter counts, shapes, statistics, names."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afkd_jax import models
from afkd_jax.devices.arrays import scalar_count
from afkd_jax.errors import UserError
from afkd_jax.models import (
    layers,
    mobilenet_v2,
    resnet,
    resnet_cifar,
    shufflenet_v2,
    vgg,
    wide_resnet,
)
from afkd_jax.tools.flops import multiply_adds


@functools.cache
def abstract(name, num_classes, size=32, channels=3):
    network = models.build(name, num_classes, (size, size, channels))
    image = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    outputs, variables = jax.eval_shape(
        lambda k, x: network.init_with_output(k, x, False), key, image
    )
    return network, outputs, variables, image


def random_variables(name, images):
    """Returns a network for 5 classes, and variables like initial ones, without compiling init."""
    rng = np.random.default_rng(0)
    network, _, abstract_variables, _ = abstract(name, 5, *images.shape[2:])

    def draw(path, leaf):
        kind = path[-1].key
        if kind == 'kernel':
            values = rng.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:
            values = np.full(leaf.shape, {'scale': 1, 'var': 1, 'bias': 0, 'mean': 0}[kind])
        return values.astype(leaf.dtype)

    return network, jax.tree_util.tree_map_with_path(draw, abstract_variables)


def noise(size, batch=4, channels=1):
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, size, size, channels)).astype(np.float32)


@pytest.mark.parametrize(
    ('name', 'num_classes', 'count'),
    [
        # A: Y. Idelbayev's "Proper ResNet Implementation for CIFAR10/CIFAR100 in PyTorch".
        ('resnet20-A', 10, 269_722),
        ('resnet56-A', 10, 853_018),
        # B, with 1x1-convolution shortcuts, and the wide and dense networks: osmr's imgclsmob
        # (pytorchcv), pytorch/README.md.
        ('resnet20', 100, 278_324),
        ('resnet56', 100, 861_620),
        ('resnet110', 100, 1_736_564),
        ('wrn-16-10', 10, 17_116_634),
        ('wrn-28-10', 10, 36_479_194),
        ('wrn-40-8', 100, 35_794_484),
        ('densenet-40-12', 10, 176_122),
        ('densenet-100-12', 100, 800_032),
        # The distillation literature, for CIFAR-10 or CIFAR-100 (RepDistiller's networks).
        ('resnet32', 10, 466_906),
        ('wrn-16-2', 100, 703_284),
        ('wrn-40-2', 100, 2_255_156),
        # chenyaofo's pytorch-cifar-models: 2.24, 0.70, 1.26 and 0.35 million in its README, exact
        # from its checkpoints.
        ('mobilenet_v2', 10, 2_236_682),
        ('mobilenet_v2x0.5', 10, 700_490),
        ('shufflenet_v2', 10, 1_263_854),
        ('shufflenet_v2x0.5', 10, 352_042),
    ],
)
def test_published_parameter_counts_for_small_images(name, num_classes, count):
    _, _, variables, _ = abstract(name, num_classes)
    assert scalar_count(variables['params']) == count


@pytest.mark.parametrize(
    ('name', 'count'),
    [
        # torchvision's documentation, num_params.
        ('resnet18', 11_689_512),
        ('resnet34', 21_797_672),
        ('resnet50', 25_557_032),
        ('resnet101', 44_549_160),
        ('resnet152', 60_192_808),
        ('mobilenet_v2', 3_504_872),
        ('shufflenet_v2x0.5', 1_366_792),
        ('shufflenet_v2', 2_278_604),
        ('shufflenet_v2x1.5', 3_503_624),
        ('shufflenet_v2x2.0', 7_393_996),
    ],
)
def test_published_parameter_counts_for_imagenet(name, count):
    _, _, variables, _ = abstract(name, 1000, 224)
    assert scalar_count(variables['params']) == count


@pytest.mark.parametrize(
    ('name', 'convolutions', 'count'),
    [
        # kuangliu's pytorch-cifar, as quoted by thop and others; vgg8: 3.96 million in the
        # distillation literature, the rest counted by hand from RepDistiller's models/vgg.py.
        ('vgg8', (1, 1, 1, 1, 1), 3_965_028 - 513 * 90),
        ('vgg11', (1, 1, 2, 2, 2), 9_231_114),
        ('vgg13', (2, 2, 2, 2, 2), 9_416_010),
        ('vgg16', (2, 2, 3, 3, 3), 14_728_266),
        ('vgg19', (2, 2, 4, 4, 4), 20_040_522),
    ],
)
def test_published_parameter_counts_of_vgg(name, convolutions, count):
    # Theirs have a bias before every norm, which cancels there; ours have none.
    biases = np.dot(convolutions, vgg.CHANNELS)
    _, _, variables, _ = abstract(name, 10)
    assert scalar_count(variables['params']) == count - biases


def test_multiply_adds_by_hand():
    # resnet8-A, 8x8x1: stem 64*9*1*16; stage 1 2*64*9*16*16; stage 2 16*9*(16*32 + 32*32);
    # stage 3 4*9*(32*64 + 64*64); head 64*10.
    expected = 64 * 9 * 16 + 2 * 64 * 9 * 256 + 16 * 9 * 1536 + 4 * 9 * 6144 + 640
    network, _, variables, image = abstract('resnet8-A', 10, size=8, channels=1)
    image = jax.ShapeDtypeStruct((1, *image.shape[1:]), image.dtype)
    assert multiply_adds(lambda v, x: network.apply(v, x, False), variables, image) == expected


# Name -> channels of the map, and its height for images of 8, 28, 32, 64 and 224.
SHAPES = {
    'resnet8': (64, (2, 7, 8, 16, 56)),
    'resnet8x2-A': (128, (2, 7, 8, 16, 56)),
    'resnet50-B': (64, (2, 7, 8, 16, 56)),
    'wrn-16-2': (128, (2, 7, 8, 16, 56)),
    'wrn-10-1-drop0.3': (64, (2, 7, 8, 16, 56)),
    'densenet-40-12': (132, (2, 7, 8, 16, 56)),
    'vgg8': (512, (1, 3, 4, 8, 14)),
    'resnet18': (512, (1, 4, 4, 8, 7)),
    'resnet50': (2048, (1, 4, 4, 8, 7)),
    'mobilenet_v2': (1280, (1, 4, 4, 8, 7)),
    'mobilenet_v2x1.4': (1792, (1, 4, 4, 8, 7)),
    'shufflenet_v2': (1024, (1, 4, 4, 8, 7)),
    'shufflenet_v2x2.0': (2048, (1, 4, 4, 8, 7)),
}


# As deep or wide as they are elsewhere; the others show the family's rule.
LARGE = ('resnet50-B', 'densenet-40-12', 'mobilenet_v2x1.4', 'shufflenet_v2x2.0')


@pytest.mark.parametrize(
    'name',
    [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in SHAPES],
)
def test_shapes(name):
    channels, heights = SHAPES[name]
    for size, height in zip((8, 28, 32, 64, 224), heights, strict=True):
        _, (logits, maps), _, _ = abstract(name, 7, size, 1)
        assert logits.shape == (2, 7)
        assert maps.shape == (2, height, height, channels), size


@pytest.mark.parametrize(
    ('size', 'strided'), [((32, 32), False), ((95, 300), False), ((96, 96), True)]
)
def test_the_smaller_side_decides_the_stem(size, strided):
    for name in ('resnet18', 'mobilenet_v2', 'shufflenet_v2'):
        assert ('stride 2' in models.build(name, 10, (*size, 3)).trunk.stem) == strided
    assert models.build('resnet20', 10, (*size, 3)).trunk.stem == 'conv 3x3'


# The smallest of each family; the wider ones differ in numbers only.
SMALLEST = {
    'resnet8': 8,
    'wrn-10-1': 8,
    'vgg8': 8,
    'densenet-10-4': 8,
    'mobilenet_v2x0.1': 8,
    'shufflenet_v2x0.5': 16,
    'resnet18': 8,
}


@pytest.mark.parametrize('name', SMALLEST)
def test_evaluation_leaves_the_batch_statistics_alone_and_training_does_not(name):
    images = noise(SMALLEST[name])
    network, variables = random_variables(name, images)

    @jax.jit
    def both(variables, images):
        return [
            network.apply(variables, images, train, mutable=['batch_stats'])
            for train in (False, True)
        ]

    ((logits, maps), evaluated), (_, trained) = both(variables, images)
    old = jax.tree.leaves(variables['batch_stats'])
    assert all(map(np.array_equal, old, jax.tree.leaves(evaluated['batch_stats'])))
    same = [*map(np.array_equal, old, jax.tree.leaves(trained['batch_stats']))]
    assert not any(same)
    # The map is activated, and feeds the classifier through its mean.
    assert maps.min() == 0
    assert maps.max() > 0
    head = variables['params']['head']['Dense_0']
    expected = np.asarray(maps).mean((1, 2)) @ head['kernel'] + head['bias'][None]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_he_initialisation():
    network = models.build('resnet8x2', 10, (8, 8, 3))
    init = jax.jit(functools.partial(network.init, train=False))
    variables = init(jax.random.key(0), noise(8, channels=3))
    kernel = variables['params']['trunk']['stage3_block1']['conv2']['kernel']
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.02)
    assert abs(float(kernel.mean())) < 1e-3


LAYERS = layers.layers(None)
WIDE = wide_resnet.Block(4, 1, 0.0, LAYERS)


@pytest.mark.parametrize(
    ('block', 'activated'),
    [
        (resnet_cifar.Block(4, 1, 'B', LAYERS), True),
        (resnet.Block(4, 1, False, LAYERS), True),
        (resnet.Block(1, 1, True, LAYERS), True),
        (WIDE, False),
        (mobilenet_v2.Block(4, 1, 6, LAYERS), False),
    ],
    ids=['resnet_cifar', 'resnet', 'bottleneck', 'wide_resnet', 'mobilenet_v2'],
)
def test_a_block_whose_weights_are_zero_returns_its_input(block, activated):
    x = noise(6, channels=4)
    variables = jax.tree.map(jnp.zeros_like, block.init(jax.random.key(0), x, False))
    out = block.apply(variables, x, False)
    np.testing.assert_array_equal(out, np.maximum(x, 0) if activated else x)


def test_a_wide_block_that_changes_the_shape_equals_a_plain_computation():
    # The shortcut starts from the activated input. Running statistics of 0 and 1 make each norm
    # a division.
    x = noise(6, channels=3)
    block = WIDE.clone(stride=2)
    variables = block.init(jax.random.key(0), x, False)
    kernels = {name: part['kernel'] for name, part in variables['params'].items() if 'conv' in name}

    def conv(x, name, stride, padding):
        return jax.lax.conv_general_dilated(
            x, kernels[name], (stride,) * 2, [(padding,) * 2] * 2,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )  # fmt: skip

    def activated(x):
        return np.maximum(np.asarray(x) / np.sqrt(1 + 1e-5), 0)

    y = activated(conv(activated(x), 'conv1', 2, 1))
    expected = conv(activated(x), 'conv_short', 2, 0) + conv(y, 'conv2', 1, 1)
    np.testing.assert_allclose(block.apply(variables, x, False), expected, rtol=1e-4, atol=1e-5)


def test_mobilenets_activations_end_at_6():
    block = mobilenet_v2.Block(3, 1, 6, LAYERS)
    x = 1e4 * noise(4, channels=4)
    out, variables = block.init_with_output(jax.random.key(0), x, False)
    # The last 1x1 convolution of the block sees no more than 6 in each channel.
    kernel = np.abs(variables['params']['ConvNorm_2']['conv']['kernel'])
    assert np.all(np.abs(out) <= 6 * kernel.sum((0, 1, 2)) * 1.001)


def test_a_shuffled_unit_interleaves_its_two_halves():
    # What the first half of the channels brings is left as it is, at the even indices.
    images = noise(4, channels=6)
    unit = shufflenet_v2.Unit(6, False, LAYERS)
    out, _ = unit.init_with_output(jax.random.key(0), images, False)
    np.testing.assert_array_equal(out[..., ::2], images[..., :3])
    assert not np.allclose(out[..., 1::2], images[..., 3:])


def test_dropout_drops_at_its_rate_and_preserves_the_mean():
    x = jnp.ones((64, 5, 5, 8))
    module = layers.Dropout(0.3, None)
    key = {'dropout': jax.random.key(0)}
    dropped = np.asarray(module.apply({}, x, True, rngs=key))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.7)}
    assert (dropped == 0).mean() == pytest.approx(0.3, abs=0.02)
    assert len({image.tobytes() for image in dropped}) == 64
    np.testing.assert_array_equal(dropped, module.apply({}, x, True, rngs=key))
    other = module.apply({}, x, True, rngs={'dropout': jax.random.key(1)})
    assert not np.array_equal(dropped, other)
    np.testing.assert_array_equal(module.apply({}, x, False), x)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('resnet21', 'depth 21.*6n + 2.*"resnet20" and "resnet26"'),
        ('resnet200', '"resnet200" is not known.*"resnet200-B" or "resnet200-A"'),
        ('resnet50x2', '"resnet50x2-B"'),
        ('resnet020', 'did you mean "resnet20"'),
        ('resnet２０', 'no network'),
        ('resnet2', 'depth 2.*"resnet8" and "resnet14"'),
        ('resnet8x0', 'width multiplier 0; the smallest is 1'),
        ('resnet32-C', 'there is no network "resnet32-C"; did you mean "resnet32"'),
        ('wrn-17-2', 'depth 17.*6n + 4.*"wrn-16-2" and "wrn-22-2"'),
        ('wrn-16-0', 'width 0; the smallest is 1'),
        ('wrn-16-2-drop1', 'dropout 1; it must be above 0 and below 1'),
        ('wrn-16-2-drop0', 'dropout 0; it must be above 0'),
        ('wrn-016-2', 'did you mean "wrn-16-2"'),
        ('wrn16-2', 'there is no network "wrn16-2"; did you mean "wrn-16-2"'),
        ('densenet-41-12', 'depth 41.*"densenet-40-12" and "densenet-46-12"'),
        ('densenet-40-0', 'growth rate 0'),
        ('mobilenet_v2x0.0', 'width multiplier 0'),
        ('mobilenet_v2x1', 'did you mean "mobilenet_v2'),
        ('mobilenetv2', 'did you mean "mobilenet_v2"'),
        ('shufflenet_v2x3.0', 'did you mean "shufflenet_v2x'),
        ('vgg12', 'did you mean "vgg1'),
        ('', 'there is no network ""; valid: densenet-100-12, densenet-40-12'),
    ],
)
def test_unknown_names_are_rejected(name, message):
    with pytest.raises(
        UserError, match=f'config.networks: .*{re.escape(message)}'.replace(re.escape('.*'), '.*')
    ):
        models.build(name, 10, (32, 32, 3))
