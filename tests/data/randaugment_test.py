"""RandAugment by Pillow."""

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from afkd_jax.config import Data
from afkd_jax.data import decode, randaugment

PHOTO = load_sample_image('flower.jpg')[100:164, 200:264]


def view_of(size, operations, magnitude):
    return decode.View(
        Data(
            image_size=size,
            crop_scale=(0.5, 1.0),
            crop_ratio=(1.0, 1.0),
            eval_resize=36,
            randaugment_operations=operations,
            randaugment_magnitude=magnitude,
        )
    )


def test_without_magnitude_only_colours_and_noise_free_operations_remain():
    changed = set()
    for name, operation in randaugment.OPERATIONS.items():
        image = decode.Image.fromarray(PHOTO)
        out = np.asarray(operation(image, 0.0, 1))
        assert out.shape == PHOTO.shape
        if (out != PHOTO).any():
            changed.add(name)
    # These two have no magnitude.
    assert changed <= {'autocontrast', 'equalize'}


@pytest.mark.parametrize('name', sorted(set(randaugment.OPERATIONS) - {'identity'}))
@pytest.mark.parametrize('channels', [1, 3])
def test_every_operation_does_something_in_both_directions(name, channels):
    image = decode.Image.fromarray(PHOTO if channels == 3 else PHOTO[..., 1])
    for sign in (-1, 1):
        out = np.asarray(randaugment.OPERATIONS[name](image, 1.0, sign))
        assert out.dtype == np.uint8
        assert out.shape == np.asarray(image).shape
        if (name, channels) != ('color', 1):
            assert (out != np.asarray(image)).any()


def test_a_translation_and_a_solarisation_are_those_of_numpy():
    image = decode.Image.fromarray(PHOTO)
    moved = np.asarray(randaugment.OPERATIONS['translate_x'](image, 1 / 0.45 / 64 * 8, 1))
    np.testing.assert_array_equal(moved[:, :-8], PHOTO[:, 8:])
    assert (moved[:, -8:] == 0).all()
    half = np.asarray(randaugment.OPERATIONS['solarize'](image, 0.5, 1))
    np.testing.assert_array_equal(half, np.where(PHOTO < 128, PHOTO, 255 - PHOTO))


@pytest.mark.parametrize('channels', [1, 3])
def test_an_image_is_a_function_of_its_generator(channels):
    image, view = PHOTO[..., :channels], view_of(0, 2, 9)
    one, two, other = (
        view.training(image, channels, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert one.shape == image.shape
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_a_view_varies_in_training_alone():
    plain = view_of(32, 0, 20)
    view = view_of(32, 3, 20)
    np.testing.assert_array_equal(view.evaluation(PHOTO, 3), plain.evaluation(PHOTO, 3))
    seen = view.training(PHOTO, 3, np.random.default_rng(0))
    assert (seen != plain.training(PHOTO, 3, np.random.default_rng(0))).any()
    whole = view_of(0, 3, 20)
    assert whole.training(PHOTO, 3, np.random.default_rng(0)).shape == PHOTO.shape
