"""Data sets and their splits."""

import numpy as np
import pytest
from conftest import tiny_config
from sklearn import datasets

from afkd_jax.data import dataset as sources
from afkd_jax.errors import UserError


def as_set(images):
    return {(picture.tobytes(), int(y)) for picture, y in zip(images.pixels, images.labels)}  # noqa: B905


def test_digits_are_split_into_three_disjoint_stratified_parts():
    splits = sources.load(tiny_config())
    parts = splits.train, splits.validation, splits.test
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
    assert len(as_set(splits.train) | as_set(splits.validation) | as_set(splits.test)) == sum(
        len(as_set(part)) for part in parts
    )
    share = np.bincount(digits.target) / len(digits.target)
    for part in parts:
        assert np.abs(np.bincount(part.labels) / len(part) - share).max() < 0.01


def test_the_splits_do_not_depend_on_the_seed():
    one, two = (sources.load(tiny_config(seed=seed)) for seed in (0, 1))
    np.testing.assert_array_equal(one.train.pixels, two.train.pixels)
    np.testing.assert_array_equal(one.test.labels, two.test.labels)


def test_the_first_n_are_the_beginning_of_the_first_m():
    some, more = (sources.load(tiny_config(data__train_examples=n)) for n in (100, 300))
    assert len(some.train) == 100
    np.testing.assert_array_equal(some.train.pixels, more.train.pixels[:100])
    np.testing.assert_array_equal(some.validation.pixels, more.validation.pixels)
    assert set(some.train.labels) == set(range(10))


def test_places_are_laid_out_one_after_the_other():
    info = sources.Info((8, 8, 1), 10, 5, 3, 4)
    places = [info.places(split) for split in ('train', 'validation', 'test')]
    assert places == [range(5), range(5, 8), range(8, 12)]


@pytest.mark.parametrize(
    ('field', 'value', 'sentence'),
    [
        ('data__train_examples', 1296, 'at most 1294.*but is 1296'),
        ('batch_size', 2000, 'at most 1294.*but is 2000'),
        ('data__pad', 8, 'must be below 8.*but is 8'),
        ('data__validation_fraction', 1e-4, '0.0001 of 1438 training images .* is no image'),
    ],
)
def test_fields_that_do_not_fit_the_images_are_refused(field, value, sentence):
    with pytest.raises(UserError, match=sentence):
        sources.load(tiny_config(**{field: value}))
