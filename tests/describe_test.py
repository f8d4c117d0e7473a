"""--mode describe: facts by hand, without data, training or a device."""

import jax.numpy as jnp
import pytest
from conftest import tiny_config

from afkd_jax import describe
from configs import default


def test_the_papers_experiment_is_described_without_data(tmp_path):
    config = default.get_config()
    config.data.data_dir = str(tmp_path)
    facts = describe.describe(config)
    assert facts['image_shape'] == [32, 32, 3]
    assert facts['images'] == {'train': 50_000, 'validation': 0, 'test': 10_000}
    assert facts['steps'] == 117_188  # ceil(300 * 50,000 / 128)
    logit = facts['optimizers']['logit']
    assert logit['changes'] == [{'step': 58_594, 'factor': 0.1}, {'step': 87_891, 'factor': 0.1}]
    for entry, teacher in zip(facts['networks'], (2, 1), strict=True):
        assert entry['name'] == 'resnet32'
        assert entry['parameters'] == 472_756  # 466,906 for 10 classes, and 90 * 65
        assert entry['feature_map'] == [8, 8, 64]
        assert entry['teacher'] == teacher
        assert entry['transfer'] is None
        # 9 * 64 * 64, a norm, 4 * 4 * 64 + 1
        assert entry['discriminator'] == {'parameters': 36_864 + 128 + 1_025}
        assert entry['multiply_adds'] == pytest.approx(69.5e6, rel=0.01)
    text = describe.text(facts)
    assert 'network 2 (resnet32) teaches network 1 (resnet32)' in text
    assert 'x0.1 at step 58,594' in text


def test_a_mixed_ring_of_three():
    config = tiny_config(('resnet8', 'resnet8x2', 'resnet8-A'), feature__boundaries=(10.0, 99.0))
    facts = describe.describe(config)
    assert [entry['teacher'] for entry in facts['networks']] == [3, 1, 2]
    transfer = {'parameters': 64 * 128 + 256, 'feature_map': [2, 2, 128]}
    assert [entry['transfer'] for entry in facts['networks']] == [transfer, None, transfer]
    assert '(after the end: never)' in describe.text(facts)


def test_alone_there_is_no_ring_and_no_adversary():
    facts = describe.describe(tiny_config(method='vanilla'))
    assert 'nobody teaches' in describe.text(facts)
    assert list(facts['optimizers']) == ['logit']
    assert all(entry['discriminator'] is None for entry in facts['networks'])


def test_multiply_adds_of_a_matrix_product_by_hand():
    count = describe.multiply_adds(lambda a, b: jnp.tanh(a @ b), jnp.ones((3, 4)), jnp.ones((4, 5)))
    assert count == 3 * 4 * 5
