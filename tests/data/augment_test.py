"""Gathering, varying and standardising images on the device."""

import functools

import jax
import numpy as np
import pytest

from afkd_jax.data import augment
from afkd_jax.data.dataset import Splits
from afkd_jax.data.examples import Images
from afkd_jax.devices import mesh as parallel


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
    batch = jax.jit(functools.partial(augment.training_batch, recipe=augment.Recipe(2, True)))
    key = jax.random.key(5)
    index = np.arange(12)
    images, labels, _ = batch(table, index, key)
    backwards, backward_labels, _ = batch(table, index[::-1], key)
    np.testing.assert_array_equal(images, backwards[::-1])
    np.testing.assert_array_equal(labels, splits.train.labels[:12])
    np.testing.assert_array_equal(labels, backward_labels[::-1])
    other, *_ = batch(table, index, jax.random.key(6))
    assert not np.array_equal(images, other)


RAMP = np.arange(4 * 8 * 8 * 3).reshape(4, 8, 8, 3) % 251
LABELS = np.arange(4, dtype=np.int32)


def varied(recipe, count=1, key=0, channels=3):
    """Returns training_batch of four images on `count` devices, not standardised."""
    table = augment.Table(
        RAMP[..., :channels].astype(np.uint8),
        LABELS,
        np.zeros(channels, np.float32),
        np.ones(channels, np.float32),
    )
    devices = parallel.Devices.take('shard_map', count)
    batch = devices.map(
        lambda table, index, key: augment.training_batch(table, index, key, recipe),
        (parallel.WHOLE, parallel.SPLIT, parallel.WHOLE),
        parallel.SPLIT,
    )
    index = devices.split(np.arange(4, dtype=np.int32))
    table, key = devices.replicate((table, jax.random.key(key)))
    return jax.device_get(batch(table, index, key))


@pytest.mark.parametrize(
    'recipe',
    [
        augment.Recipe(2, True, 0.4),
        augment.Recipe(mixup=1.0),
        augment.Recipe(cutmix=1.0),
        augment.Recipe(2, True, 0.4, 0.8, 1.0),
    ],
)
def test_the_variation_does_not_depend_on_the_devices(recipe):
    one, four = varied(recipe), varied(recipe, 4)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    other = varied(recipe, key=1)
    assert np.abs(one[0] - other[0]).max() > 0.05


def test_jitter_is_what_numpy_makes_of_its_factors():
    image = RAMP[1] / 255
    key = jax.random.key(3)
    ours = np.asarray(augment.jittered(key, image.astype(np.float32), 0.5))
    brightness, contrast, saturation = np.asarray(
        jax.random.uniform(key, (3,), minval=0.5, maxval=1.5), np.float64
    )
    luma = np.array([0.299, 0.587, 0.114])
    image = np.clip(brightness * image, 0, 1)
    mean = (image @ luma).mean()
    image = np.clip(mean + contrast * (image - mean), 0, 1)
    grey = (image @ luma)[..., None]
    np.testing.assert_allclose(ours, np.clip(grey + saturation * (image - grey), 0, 1), atol=1e-5)


def test_no_jitter_is_the_identity_and_grey_has_no_saturation():
    image = (RAMP[2] / 255).astype(np.float32)
    np.testing.assert_allclose(augment.jittered(jax.random.key(0), image, 0.0), image, atol=1e-6)
    grey = image[..., :1]
    ours = augment.jittered(jax.random.key(0), grey, 0.3)
    assert ours.shape == grey.shape
    assert np.abs(ours - grey).max() > 0.01


def test_mixup_is_the_sum_by_its_shares():
    images, labels, mixed = varied(augment.Recipe(mixup=1.0))
    own = RAMP / 255
    other = np.roll(own, 1, axis=0)  # the image before
    share = mixed.share[:, None, None, None]
    np.testing.assert_allclose(images, share * own + (1 - share) * other, atol=1e-6)
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(mixed.labels, np.roll(LABELS, 1))
    assert len(set(mixed.share.tolist())) == 4


def test_cutmix_is_a_box_and_its_share_that_of_the_pixels():
    for key in range(8):
        images, _, mixed = varied(augment.Recipe(cutmix=1.0), key=key)
        own = RAMP / 255
        other = np.roll(own, 1, axis=0)
        mine = np.isclose(images, own, atol=1e-6).all(-1)
        theirs = np.isclose(images, other, atol=1e-6).all(-1)
        assert (mine ^ theirs).all()
        np.testing.assert_allclose(mixed.share, mine.mean((1, 2)), atol=1e-6)
        for cut in theirs:  # a box: its rows are all alike, or empty
            rows = cut[cut.any(1)]
            assert (rows == rows[:1]).all()


def test_shares_are_drawn_from_the_beta_distribution():
    keys = jax.random.split(jax.random.key(0), 4000)
    images = np.zeros((4000, 1, 1, 1), np.float32)
    devices = parallel.Devices.take('shard_map', 1)
    mix = devices.map(
        lambda keys, images, labels: augment.mixed(keys, images, labels, 0.5, 0.0)[1].share,
        (parallel.SPLIT,) * 3,
        parallel.SPLIT,
    )
    share = np.asarray(mix(keys, images, np.zeros(4000, np.int32)))
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert share.mean() == pytest.approx(0.5, abs=0.02)
    assert share.var() == pytest.approx(1 / 8, rel=0.06)


def test_with_both_each_image_goes_by_either():
    kinds = []
    for key in range(10):
        images, _, _ = varied(augment.Recipe(mixup=5.0, cutmix=1.0), key=key)
        own = RAMP / 255
        kinds += np.isclose(images, own, atol=1e-6).all(-1).any((1, 2)).tolist()
    assert 5 < sum(kinds) < 35


def test_what_is_mirrored_is_neither_darker_nor_brighter():
    # A grey image with one bright half: by its place one sees the flip, by its height the factor.
    image = np.full((1, 8, 8, 1), 100, np.uint8)
    image[:, :, 4:] = 120
    table = augment.Table(image, np.zeros(1, np.int32), np.float32([0]), np.float32([1]))
    recipe = augment.Recipe(0, True, 0.5)
    batch = jax.jit(
        jax.vmap(lambda key: augment.training_batch(table, np.zeros(1, np.int32), key, recipe)[0])
    )
    seen = np.asarray(batch(jax.random.split(jax.random.key(0), 800)))[:, 0]
    left, right = seen[:, 0, 0, 0], seen[:, 0, -1, 0]
    flipped, bright = left > right, (left + right) / 2
    assert 300 < flipped.sum() < 500
    assert bright.min() < 0.3 < 0.55 < bright.max()
    assert abs(bright[flipped].mean() - bright[~flipped].mean()) < 0.03
