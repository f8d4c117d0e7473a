"""--mode describe: facts by hand, without data, training or a device."""

import re

import jax
import jax.numpy as jnp
import pytest
from conftest import tiny_config

from afkd_jax import models
from afkd_jax.config import Config
from afkd_jax.devices import convolution
from afkd_jax.registry import NETWORKS
from afkd_jax.tools import describe
from afkd_jax.tools.flops import multiply_adds as count_multiply_adds


def test_the_papers_experiment_is_described_without_data(tmp_path):
    config = Config().replace(**{'data.data_dir': str(tmp_path)})
    facts = describe.describe(config)
    assert facts['image_shape'] == [32, 32, 3]
    assert facts['images'] == {'train': 50_000, 'validation': 0, 'test': 10_000}
    assert facts['steps'] == 117_188  # ceil(300 * 50,000 / 128)
    logit = facts['optimizers']['logit']
    assert (logit['rule'], logit['momentum'], logit['weight_decay']) == ('SGD', 0.9, 1e-4)
    assert facts['optimizers']['feature']['rule'] == 'Adam'
    assert logit['changes'] == [{'step': 58_594, 'factor': 0.1}, {'step': 87_891, 'factor': 0.1}]
    for entry, teacher in zip(facts['networks'], (2, 1), strict=True):
        assert entry['stem'] == 'conv 3x3'
        assert entry['name'] == 'resnet32'
        assert entry['parameters'] == 472_756  # 466,906 for 10 classes, and 90 * 65
        assert entry['feature_map'] == [8, 8, 64]
        assert entry['logit_teachers'] == [teacher]
        assert entry['map_teacher'] == teacher
        assert entry['transfer'] is None
        # 9 * 64 * 64, a norm, 4 * 4 * 64 + 1
        assert entry['discriminator'] == {'parameters': 36_864 + 128 + 1_025}
        assert entry['multiply_adds'] == pytest.approx(69.5e6, rel=0.01)
    text = describe.text(facts)
    assert 'network 1 (resnet32) learns from the logits of 2 (resnet32), and from the maps' in text
    assert (
        'logit optimizer: SGD, momentum 0.9, weight decay 0.0001, learning rate 0.1, x0.1' in text
    )
    assert 'x0.1 at step 58,594' in text
    assert '117,188 steps of batch 128' in text


def test_a_mixed_ring_of_three():
    config = tiny_config(('resnet8', 'resnet8x2', 'resnet8-A'), ring_order=(2, 1, 3))
    facts = describe.describe(config)
    assert [entry['map_teacher'] for entry in facts['networks']] == [2, 3, 1]
    assert [entry['logit_teachers'] for entry in facts['networks']] == [[2], [3], [1]]
    transfer = {'parameters': 64 * 128 + 256, 'feature_map': [2, 2, 128]}
    assert [entry['transfer'] for entry in facts['networks']] == [transfer, None, transfer]
    first, wide, other = (entry['multiply_adds'] for entry in facts['networks'])
    assert other < first < wide / 2  # twice the channels; shortcuts without convolutions


def test_alone_there_is_no_ring_and_no_adversary():
    facts = describe.describe(tiny_config(method='vanilla'))
    assert 'no network teaches another' in describe.text(facts)
    assert list(facts['optimizers']) == ['logit']
    assert all(entry['discriminator'] is None for entry in facts['networks'])


def test_the_switches_are_described():
    config = tiny_config(
        logit__learning_rates=(0.1, 0.02),
        logit__nesterov=True,
        logit__clip_norm=2.0,
        logit__warm_up=0.1,
        logit__decay_all=False,
        accumulate=2,
        discriminator__norm='spectral',
        adversarial__direction='better_only',
    )
    facts = describe.describe(config)
    assert facts['adversary'].items() >= {
        'norm': 'spectral', 'loss': 'lsgan', 'width': 8, 'direction': 'better_only',
    }.items()  # fmt: skip
    text = describe.text(facts)
    assert 'adversary: loss lsgan, norm spectral, condition none, input map, layers 1' in text
    assert (
        'logit optimizer: SGD, momentum 0.9, nesterov, gradients clipped to norm 2, weight decay '
        '0.0001 on kernels only, learning rate 0.1 and 0.02, warm-up of 41 steps, '
        'gradients averaged over 2 steps' in text
    )
    assert describe.describe(tiny_config(method='dml'))['adversary'] is None


@pytest.mark.parametrize('groups', [1, 6])
def test_a_gradient_has_as_many_multiply_adds_as_its_convolution(groups):
    x, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 6 // groups, 6))
    dims = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))

    def forward(x, kernel):
        options = {'dimension_numbers': dims, 'feature_group_count': groups}
        return convolution.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), **options)

    def gradients(x, kernel):
        y, pull = jax.vjp(forward, x, kernel)
        return pull(y)

    expected = (2 * 4 * 4 * 6) * (3 * 3 * 6 // groups)
    assert count_multiply_adds(forward, x, kernel) == expected
    assert count_multiply_adds(gradients, x, kernel) == 3 * expected


def test_multiply_adds_of_a_matrix_product_by_hand():
    count = count_multiply_adds(lambda a, b: jnp.tanh(a @ b), jnp.ones((3, 4)), jnp.ones((4, 5)))
    assert count == 3 * 4 * 5


def test_dml_learns_from_all_the_others():
    facts = describe.describe(
        tiny_config(('tiny-4-2',) * 3, method='dml', epochs=2, batch_size=8, loss__kl_ramp_up=0.2)
    )
    assert [entry['logit_teachers'] for entry in facts['networks']] == [[3, 2], [1, 3], [2, 1]]
    assert [entry['map_teacher'] for entry in facts['networks']] == [None] * 3
    assert facts['loss'] == {
        'label_smoothing': 0.0, 'temperature': 3.0, 'kl_weight': 1.0, 'kl_ramp_steps': 65
    }  # fmt: skip
    text = describe.text(facts)
    assert 'loss: label_smoothing 0, temperature 3, kl_weight 1, kl_ramp_steps 65\n' in text
    assert 'network 1 (tiny-4-2) learns from the logits of 3 (tiny-4-2), 2 (tiny-4-2)\n' in text


# Deeper or wider than another one that is described.
LARGE = r'resnet(38|44|56|101|110|152)|wrn-(28|40)-.*|densenet-100-12|\w+_v2x[1-9.]*|vgg1[136]'


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[pytest.mark.slow] if re.fullmatch(LARGE, name) else [])
        for name in NETWORKS.names()
    ],
)
def test_every_registered_network_is_described(name, tmp_path):
    config = Config().replace(networks=(name, 'resnet8'), **{'data.data_dir': str(tmp_path)})
    first, second = describe.describe(config)['networks']
    assert first['name'] == name
    assert first['stem'].startswith('conv 3x3')
    assert first['multiply_adds'] > 10**6
    height, width, _ = first['feature_map']
    smallest = min(height, second['feature_map'][0])
    for entry in (first, second):
        fits = entry['feature_map'] == [smallest, smallest, max(first['feature_map'][2], 64)]
        assert (entry['transfer'] is None) == fits
    assert height == width


@pytest.mark.parametrize(
    ('name', 'image_size', 'multiply_adds'),
    [
        # Published, in millions: torchvision's GFLOPs, and pytorch-cifar-models' MAdds.
        ('resnet18', 224, 1814),
        ('resnet50', 224, 4089),
        ('mobilenet_v2', 224, 301),
        ('shufflenet_v2', 224, 145),
        ('mobilenet_v2', 32, 88.09),
        ('shufflenet_v2', 32, 45.0),
    ],
)
def test_published_multiply_adds(name, image_size, multiply_adds):
    network = models.build(name, 1000 if image_size == 224 else 100, (image_size, image_size, 3))
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(lambda k, x: network.init(k, x, False), key, image)
    actual = count_multiply_adds(lambda v, x: network.apply(v, x, False), variables, image)
    assert actual / 1e6 == pytest.approx(multiply_adds, rel=0.01)
