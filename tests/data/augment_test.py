"""Gathering, augmenting and standardising images on the device."""

import functools

import jax
import numpy as np
import pytest
from conftest import take_devices

from afkd_jax.config import Data
from afkd_jax.data import augment
from afkd_jax.data.examples import Images
from afkd_jax.data.images import DeviceImages
from afkd_jax.devices.mesh import BATCH_SHARDED, REPLICATED

TRAIN = 40


@pytest.fixture
def images():
    """Returns 40 images to train on, then 16 others."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (TRAIN + 16, 5, 6, 2), np.uint8)
    return Images(pixels, np.arange(len(pixels), dtype=np.int32) % 3)


def test_statistics_are_those_of_the_training_images(images):
    ours = DeviceImages.on_host(images, TRAIN)
    unit = images.pixels[:TRAIN].astype(np.float64) / 255
    np.testing.assert_allclose(ours.mean, unit.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(ours.std, unit.std((0, 1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(ours.pixels, images.pixels)
    np.testing.assert_array_equal(ours.labels, images.labels)


def test_standardised_training_images_have_mean_0_and_deviation_1(images):
    ours = jax.device_put(DeviceImages.on_host(images, TRAIN))
    inputs, labels = augment.evaluation_batch(ours, np.arange(TRAIN))
    np.testing.assert_allclose(np.mean(inputs, (0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(inputs, (0, 1, 2)), 1, atol=1e-5)
    np.testing.assert_array_equal(labels, images.labels[:TRAIN])
    assert inputs.dtype == np.float32


def test_a_constant_channel_does_not_divide_by_zero():
    pixels = np.full((4, 2, 2, 1), 200, np.uint8)
    ours = DeviceImages.on_host(Images(pixels, np.zeros(4, np.int32)), 4)
    inputs, _ = augment.evaluation_batch(jax.device_put(ours), np.arange(4))
    np.testing.assert_allclose(inputs, 0, atol=1e-4)


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
def test_augmented_images_are_all_crops_and_mirrors_and_nothing_else(pad, flip):
    image = np.random.default_rng(1).integers(1, 256, (4, 5, 2), np.uint8)
    keys = jax.random.split(jax.random.key(0), 600)
    crop_and_flip = jax.jit(
        jax.vmap(functools.partial(augment.crop_and_flip, pad=pad, flip=flip), (0, None))
    )
    cropped = np.asarray(crop_and_flip(keys, image))
    assert cropped.dtype == np.uint8
    allowed = crops(image, pad)
    if flip:
        allowed |= crops(image[:, ::-1], pad)
    assert {picture.tobytes() for picture in cropped} == allowed


def test_augmentation_depends_on_key_and_image_alone(images):
    ours = jax.device_put(DeviceImages.on_host(images, TRAIN))
    batch = jax.jit(functools.partial(augment.training_batch, data=Data(pad=2, flip=True)))
    key = jax.random.key(5)
    index = np.arange(12)
    inputs, labels, _ = batch(ours, index, key)
    backwards, backward_labels, _ = batch(ours, index[::-1], key)
    np.testing.assert_array_equal(inputs, backwards[::-1])
    np.testing.assert_array_equal(labels, images.labels[:12])
    np.testing.assert_array_equal(labels, backward_labels[::-1])
    other, *_ = batch(ours, index, jax.random.key(6))
    assert not np.array_equal(inputs, other)


RAMP = np.arange(4 * 8 * 8 * 3).reshape(4, 8, 8, 3) % 251
LABELS = np.arange(4, dtype=np.int32)


def augmented(recipe, count=1, key=0, channels=3, network=None):
    """Returns training_batch of four images on `count` devices, not standardised."""
    images = DeviceImages(
        RAMP[..., :channels].astype(np.uint8),
        LABELS,
        np.zeros(channels, np.float32),
        np.ones(channels, np.float32),
    )
    devices = take_devices(count)
    index = devices.split(np.arange(4, dtype=np.int32))
    images, key = devices.replicate((images, jax.random.key(key)))
    return jax.device_get(mapped_batch(recipe, devices, network)(images, index, key))


@functools.cache
def mapped_batch(recipe, devices, network):
    return devices.map(
        lambda images, index, key: augment.training_batch(images, index, key, recipe, network),
        (REPLICATED, BATCH_SHARDED, REPLICATED),
        BATCH_SHARDED,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'recipe',
    [
        Data(pad=2, flip=True, color_jitter=0.4),
        Data(pad=0, flip=False, mixup=1.0),
        Data(pad=0, flip=False, cutmix=1.0),
        Data(pad=2, flip=True, color_jitter=0.4, mixup=0.8, cutmix=1.0),
    ],
)
def test_augmentation_does_not_depend_on_the_devices(recipe):
    one, four = augmented(recipe), augmented(recipe, 4)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    other = augmented(recipe, key=1)
    assert np.abs(one[0] - other[0]).max() > 0.05


def test_a_network_may_have_its_own_view_but_not_its_own_mixture():
    views = [augmented(Data(pad=2, flip=False), network=network) for network in (None, 0, 1)]
    images = np.stack([images for images, *_ in views])
    assert all(np.abs(images[i] - images[j]).max() > 0.05 for i, j in ((0, 1), (0, 2), (1, 2)))
    # Colours only: the views differ, but the weights of the mixtures, and so the labels, do not.
    recipe = Data(pad=0, flip=False, color_jitter=0.4, mixup=1.0)
    (one, labels, mixed), (two, other_labels, other) = (
        augmented(recipe, network=network) for network in (0, 1)
    )
    assert np.abs(one - two).max() > 0.05
    np.testing.assert_array_equal(labels, other_labels)
    jax.tree.map(np.testing.assert_array_equal, mixed, other)


def test_jitter_is_what_numpy_makes_of_its_factors():
    image = RAMP[1] / 255
    key = jax.random.key(3)
    ours = np.asarray(augment.color_jittered(key, image.astype(np.float32), 0.5))
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
    np.testing.assert_allclose(
        augment.color_jittered(jax.random.key(0), image, 0.0), image, atol=1e-6
    )
    grey = image[..., :1]
    ours = augment.color_jittered(jax.random.key(0), grey, 0.3)
    assert ours.shape == grey.shape
    assert np.abs(ours - grey).max() > 0.01


def test_mixup_is_the_sum_by_its_weights():
    images, labels, mixed = augmented(Data(pad=0, flip=False, mixup=1.0))
    own = RAMP / 255
    other = np.roll(own, 1, axis=0)  # the image before
    weight = mixed.weight[:, None, None, None]
    np.testing.assert_allclose(images, weight * own + (1 - weight) * other, atol=1e-6)
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(mixed.labels, np.roll(LABELS, 1))
    assert len(set(mixed.weight.tolist())) == 4


def test_cutmix_is_a_box_and_its_weight_that_of_the_pixels():
    for key in range(8):
        images, _, mixed = augmented(Data(pad=0, flip=False, cutmix=1.0), key=key)
        own = RAMP / 255
        other = np.roll(own, 1, axis=0)
        mine = np.isclose(images, own, atol=1e-6).all(-1)
        theirs = np.isclose(images, other, atol=1e-6).all(-1)
        assert (mine ^ theirs).all()
        np.testing.assert_allclose(mixed.weight, mine.mean((1, 2)), atol=1e-6)
        for cut in theirs:  # a box: its rows are all equal, or empty
            rows = cut[cut.any(1)]
            assert (rows == rows[:1]).all()


def test_weights_are_drawn_from_the_beta_distribution():
    keys = jax.random.split(jax.random.key(0), 4000)
    images = np.zeros((4000, 1, 1, 1), np.float32)
    devices = take_devices()
    mix = devices.map(
        lambda keys, images, labels: augment.mixed(keys, images, labels, 0.5, 0.0)[1].weight,
        (BATCH_SHARDED,) * 3,
        BATCH_SHARDED,
    )
    weight = np.asarray(mix(keys, images, np.zeros(4000, np.int32)))
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert weight.mean() == pytest.approx(0.5, abs=0.02)
    assert weight.var() == pytest.approx(1 / 8, rel=0.06)


def test_with_both_each_image_goes_by_either():
    kinds = []
    for key in range(10):
        images, _, _ = augmented(Data(pad=0, flip=False, mixup=5.0, cutmix=1.0), key=key)
        own = RAMP / 255
        kinds += np.isclose(images, own, atol=1e-6).all(-1).any((1, 2)).tolist()
    assert 5 < sum(kinds) < 35


def test_what_is_mirrored_is_neither_darker_nor_brighter():
    # A grey image with one bright half: its side shows the flip, its brightness the factor.
    image = np.full((1, 8, 8, 1), 100, np.uint8)
    image[:, :, 4:] = 120
    images = DeviceImages(image, np.zeros(1, np.int32), np.float32([0]), np.float32([1]))
    recipe = Data(pad=0, flip=True, color_jitter=0.5)
    batch = jax.jit(
        jax.vmap(lambda key: augment.training_batch(images, np.zeros(1, np.int32), key, recipe)[0])
    )
    seen = np.asarray(batch(jax.random.split(jax.random.key(0), 800)))[:, 0]
    left, right = seen[:, 0, 0, 0], seen[:, 0, -1, 0]
    flipped, bright = left > right, (left + right) / 2
    assert 300 < flipped.sum() < 500
    assert bright.min() < 0.3 < 0.55 < bright.max()
    assert abs(bright[flipped].mean() - bright[~flipped].mean()) < 0.03
