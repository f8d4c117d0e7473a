"""Data sets and their splits."""

import numpy as np
import pytest
from conftest import tiny_config
from sklearn import datasets

from afkd_jax import config as config_lib
from afkd_jax.data import dataset as dataset_lib
from afkd_jax.errors import UserError


def as_set(images):
    return {
        (picture.tobytes(), int(label))
        for picture, label in zip(images.pixels, images.labels, strict=True)
    }


def load(config):
    """Returns the images of train, validation and test."""
    dataset = dataset_lib.dataset(config)
    images = dataset.load()
    return [
        images.take(np.array(dataset.info.indices(split), int))
        for split in ('train', 'validation', 'test')
    ]


def test_digits_are_split_into_three_disjoint_stratified_parts():
    parts = load(tiny_config())
    assert [len(part) for part in parts] == [1294, 144, 359]
    digits = datasets.load_digits()
    everything = [
        (picture.tobytes(), int(label))
        for part in parts
        for picture, label in zip(part.pixels, part.labels, strict=True)
    ]
    original = [
        ((picture * 15).astype(np.uint8).tobytes(), int(label))
        for picture, label in zip(digits.images, digits.target, strict=True)
    ]
    assert sorted(everything) == sorted(original)
    assert len(set.union(*map(as_set, parts))) == sum(len(as_set(part)) for part in parts)
    frequency = np.bincount(digits.target) / len(digits.target)
    for part in parts:
        assert np.abs(np.bincount(part.labels) / len(part) - frequency).max() < 0.01


def test_the_splits_do_not_depend_on_the_seed():
    for one, two in zip(*(load(tiny_config(seed=seed)) for seed in (0, 1)), strict=True):
        np.testing.assert_array_equal(one.pixels, two.pixels)
        np.testing.assert_array_equal(one.labels, two.labels)


def test_the_first_n_are_the_beginning_of_the_first_m():
    fields = {'data__validation_fraction': 0.0, 'batch_size': 32}
    some, more = (load(tiny_config(data__train_examples=n, **fields)) for n in (100, 300))
    assert len(some[0]) == 100
    np.testing.assert_array_equal(some[0].pixels, more[0].pixels[:100])
    assert set(some[0].labels) == set(range(10))


def test_the_validation_split_is_held_out_of_the_first_n():
    used = load(tiny_config(data__train_examples=200, data__validation_fraction=0.0))[0]
    train, validation, _ = load(tiny_config(data__train_examples=200))
    assert [len(train), len(validation)] == [180, 20]
    assert as_set(train) | as_set(validation) == as_set(used)
    assert set(validation.labels) == set(range(10))


def test_the_first_n_test_images_are_among_the_first_m():
    some, more, every, default = (
        load(tiny_config(data__test_examples=n))[2] for n in (50, 100, 359, 0)
    )
    assert [len(some), len(more)] == [50, 100]
    assert as_set(some) < as_set(more) < as_set(every)
    assert set(some.labels) == set(range(10))
    np.testing.assert_array_equal(every.pixels, default.pixels)
    config = tiny_config(data__test_examples=50)
    info = dataset_lib.info(config)
    assert (info.train, info.validation, info.test) == (1294, 144, 50)
    assert 'data.test_examples' in config_lib.run_fields(config)


def test_the_indices_of_the_splits_follow_each_other():
    info = dataset_lib.Info((8, 8, 1), ('a', 'b'), 5, 3, 4)
    indices = [info.indices(split) for split in ('train', 'validation', 'test')]
    assert indices == [range(5), range(5, 8), range(8, 12)]
    assert (info.num_classes, info.examples) == (2, 12)


@pytest.mark.parametrize(
    ('used', 'fraction', 'batch', 'left'), [(20, 0.99, 8, 0), (20, 0.7, 8, 6), (5, 0.99, 8, 0)]
)
def test_a_validation_fraction_that_leaves_too_few_images_is_named(used, fraction, batch, left):
    fields = {'data__train_examples': used, 'data__validation_fraction': fraction}
    message = (
        f'config.data.validation_fraction: {fraction} of {used} training images of digits leaves '
        f'{left} to train on, fewer than config.batch_size={batch}; lower the fraction'
    )
    with pytest.raises(UserError, match=f'^{message}'):
        dataset_lib.dataset(tiny_config(batch_size=batch, **fields))


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('data__train_examples', 1439, 'at most 1438, .* training images of digits, but is 1439'),
        ('data__test_examples', 360, 'at most 359, .* test images of digits, but is 360'),
        ('batch_size', 2000, 'at most 1294, .*validation_fraction=0.1, but is 2000'),
        ('data__pad', 8, 'must be below 8.*but is 8'),
        ('data__validation_fraction', 1e-4, '0.0001 of 1438 training images .* is no image'),
    ],
)
def test_fields_that_do_not_fit_the_images_are_rejected(field, value, message):
    with pytest.raises(UserError, match=message):
        dataset_lib.dataset(tiny_config(**{field: value}))
