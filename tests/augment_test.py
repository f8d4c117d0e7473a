"""Gathering, varying and standardising images on the device."""

import functools

import jax
import numpy as np
import pytest

from afkd_jax.data import augment
from afkd_jax.data.examples import Images
from afkd_jax.data.sources import Splits


@pytest.fixture
def splits():
    rng = np.random.default_rng(0)

    def images(count):
        pixels = rng.integers(0, 256, (count, 5, 6, 2), np.uint8)
        return Images(pixels, np.arange(count, dtype=np.int32) % 3)

    return Splits(images(40), images(7), images(9), 3)


def test_statistics_are_those_of_the_training_images(splits):
    table = augment.table(splits)
    unit = splits.train.pixels.astype(np.float64) / 255
    np.testing.assert_allclose(table.mean, unit.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(table.std, unit.std((0, 1, 2)), rtol=1e-6)
    places = splits.info.places('test')
    np.testing.assert_array_equal(table.pixels[places.start : places.stop], splits.test.pixels)
    np.testing.assert_array_equal(table.labels[places.start : places.stop], splits.test.labels)


def test_standardised_training_images_have_mean_0_and_deviation_1(splits):
    table = augment.table(splits)
    images, labels = augment.evaluation_batch(jax.device_put(table), np.arange(40))
    np.testing.assert_allclose(np.mean(images, (0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(images, (0, 1, 2)), 1, atol=1e-5)
    np.testing.assert_array_equal(labels, splits.train.labels)
    assert images.dtype == np.float32


def test_a_constant_channel_does_not_divide_by_zero():
    pixels = np.full((4, 2, 2, 1), 200, np.uint8)
    part = Images(pixels, np.zeros(4, np.int32))
    table = augment.table(Splits(part, part, part, 2))
    images, _ = augment.evaluation_batch(jax.device_put(table), np.arange(4))
    np.testing.assert_allclose(images, 0, atol=1e-4)


def crops(image, pad):
    """Returns every crop of the zero-padded image, computed with NumPy."""
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    return {
        padded[i : i + height, j : j + width].tobytes()
        for i in range(2 * pad + 1)
        for j in range(2 * pad + 1)
    }


@pytest.mark.parametrize(('pad', 'flip'), [(0, False), (1, False), (0, True), (2, True)])
def test_varied_images_are_all_crops_and_mirrors_and_nothing_else(pad, flip):
    image = np.random.default_rng(1).integers(1, 256, (4, 5, 2), np.uint8)
    keys = jax.random.split(jax.random.key(0), 600)
    vary = jax.jit(jax.vmap(functools.partial(augment.vary, pad=pad, flip=flip), (0, None)))
    varied = np.asarray(vary(keys, image))
    assert varied.dtype == np.uint8
    allowed = crops(image, pad)
    if flip:
        allowed |= crops(image[:, ::-1], pad)
    assert {picture.tobytes() for picture in varied} == allowed


def test_a_variation_depends_on_key_and_image_alone(splits):
    table = jax.device_put(augment.table(splits))
    batch = jax.jit(functools.partial(augment.training_batch, pad=2, flip=True))
    key = jax.random.key(5)
    index = np.arange(12)
    images, labels = batch(table, index, key)
    backwards, backward_labels = batch(table, index[::-1], key)
    np.testing.assert_array_equal(images, backwards[::-1])
    np.testing.assert_array_equal(labels, splits.train.labels[:12])
    np.testing.assert_array_equal(labels, backward_labels[::-1])
    other, _ = batch(table, index, jax.random.key(6))
    assert not np.array_equal(images, other)
