"""Decoding, cropping and resizing, against Pillow."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from afkd_jax.config import Data
from afkd_jax.data import decode

PHOTO = load_sample_image('china.jpg')  # 427 x 640
VIEW = decode.View(Data(image_size=64, eval_resize=72))
CROP = VIEW.data.crop_scale, VIEW.data.crop_ratio


def encoded(pixels, form='JPEG', **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def opened(data, mode='RGB'):
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


@pytest.mark.parametrize('subsampling', [0, 1, 2])
def test_a_jpeg_is_what_pillow_makes_of_it(subsampling):
    data = encoded(PHOTO, quality=92, subsampling=subsampling)
    difference = np.abs(decode.pixels(data, 3).astype(int) - opened(data))
    assert difference.max() <= 2
    assert difference.mean() < 0.01


@pytest.mark.parametrize(
    ('pixels', 'form', 'channels'),
    [
        (PHOTO, 'PNG', 3),
        (PHOTO[..., 0], 'PNG', 1),
        (PHOTO[..., 0], 'JPEG', 3),  # grey, as some of ImageNet's are
        (PHOTO, 'WEBP', 3),
        (np.dstack([PHOTO, PHOTO[..., :1]]), 'PNG', 3),  # transparent
    ],
)
def test_other_images_are_what_pillow_makes_of_them(pixels, form, channels):
    data = encoded(pixels, form)
    ours = decode.pixels(data, channels)
    assert ours.shape == (427, 640, channels)
    np.testing.assert_array_equal(ours.squeeze(), opened(data, 'RGB' if channels == 3 else 'L'))


def test_a_cmyk_jpeg_is_decoded():
    file = io.BytesIO()
    Image.fromarray(PHOTO).convert('CMYK').save(file, 'JPEG', quality=95)
    data = file.getvalue()
    assert np.abs(decode.pixels(data, 3).astype(int) - opened(data)).max() <= 1


@pytest.mark.parametrize('form', ['JPEG', 'PNG'])
def test_a_broken_file_is_reported(form):
    data = encoded(PHOTO, form)
    for broken in (b'', b'no image', data[: len(data) // 2], data[:20]):
        with pytest.raises(decode.DecodeError, match=r'\w'):
            VIEW.evaluation(broken, 3)
        with pytest.raises(decode.DecodeError, match=r'\w'):
            VIEW.training(broken, 3, np.random.default_rng(0))


def test_damage_in_the_scan_is_reported_and_harmless_bytes_are_not():
    for options in ({}, {'progressive': True}, {'restart_marker_blocks': 8}):
        data = encoded(PHOTO, quality=92, **options)
        half, noise = len(data) // 2, np.random.default_rng(0).integers(0, 255, 512, np.uint8)
        for damaged in (
            data[:half] + bytes(len(data) - half),
            data[:half] + noise.tobytes() + data[half + 512 :],
            data[:half] + data[half + 512 :],
            data[:-2],
        ):
            with pytest.raises(decode.DecodeError, match='JPEG'):
                VIEW.evaluation(damaged, 3)
            with pytest.raises(decode.DecodeError, match='JPEG'):
                VIEW.training(damaged, 3, np.random.default_rng(0))
        whole = decode.pixels(data, 3)
        for harmless in (
            data + b'text after the end',
            data + bytes(1000),
            data[:-2] + bytes(16) + data[-2:],
            data[:-2] + b'\xff' * 16 + data[-2:],
            data[:-2] + b' ' * 700 + data[-2:] + data[-2:],
        ):
            np.testing.assert_array_equal(decode.pixels(harmless, 3), whole)


def test_a_png_whose_pixels_are_not_those_of_its_checksum_is_reported():
    data = encoded(PHOTO, 'PNG')
    damaged = data[:-16] + bytes([data[-16] ^ 1]) + data[-15:]  # of the pixels' last checksum
    assert opened(damaged).shape == PHOTO.shape
    with pytest.raises(decode.DecodeError, match='checksum'):
        decode.pixels(damaged, 3)


def test_evaluation_is_the_centre_of_the_resized_image():
    # The usual recipe in two steps: shorter side to 72, then the central 64 x 64.
    data = encoded(PHOTO, 'PNG')
    resized = Image.fromarray(PHOTO).resize((round(72 * 640 / 427), 72), Image.Resampling.BILINEAR)
    left, top = (resized.width - 64) // 2, 4
    expected = np.asarray(resized.crop((left, top, left + 64, top + 64)), int)
    ours = VIEW.evaluation(data, 3).astype(int)
    assert ours.shape == (64, 64, 3)
    # Its box is exact, where the recipe rounds the width and the offset to whole pixels.
    assert np.abs(ours - expected).mean() < 4
    box = ((640 - 427 * 64 / 72) / 2, (427 - 427 * 64 / 72) / 2)
    box = (*box, 640 - box[0], 427 - box[1])
    exact = Image.fromarray(PHOTO).resize((64, 64), Image.Resampling.BILINEAR, box=box)
    np.testing.assert_array_equal(ours, np.asarray(exact))


def test_resizing_is_antialiased():
    # Columns of 0 and 255: to a quarter of the size without antialiasing they would alias.
    stripes = np.zeros((256, 256, 1), np.uint8)
    stripes[:, ::2] = 255
    view = decode.View(Data(image_size=64, crop_scale=(1, 1), crop_ratio=(1, 1), eval_resize=64))
    for seen in (
        view.evaluation(stripes, 1),
        view.training(stripes, 1, np.random.default_rng(0)),
    ):
        assert np.abs(seen[8:-8, 8:-8].astype(int) - 127.5).max() <= 1


def test_a_training_crop_is_pillows_of_the_same_box():
    data = encoded(PHOTO, 'PNG')
    for seed in range(5):
        box = decode.random_crop(427, 640, *CROP, np.random.default_rng(seed))
        expected = Image.fromarray(PHOTO).resize((64, 64), Image.Resampling.BILINEAR, box=box)
        ours = VIEW.training(data, 3, np.random.default_rng(seed))
        np.testing.assert_array_equal(ours, np.asarray(expected))


def test_a_jpeg_decoded_smaller_is_nearly_the_same():
    data = encoded(PHOTO, quality=95)
    for seed in range(8):
        ours = VIEW.training(data, 3, np.random.default_rng(seed))
        box = decode.random_crop(427, 640, *CROP, np.random.default_rng(seed))
        whole = Image.fromarray(opened(data)).resize((64, 64), Image.Resampling.BILINEAR, box=box)
        assert np.abs(ours.astype(int) - np.asarray(whole)).mean() < 4
    assert decode.pixels(data, 3, 0.2).shape == (107, 160, 3)
    assert decode.pixels(data, 3, 0.5).shape == (214, 320, 3)


def test_random_crops_are_of_the_scales_and_ratios_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array(
        [decode.random_crop(300, 400, (0.2, 0.5), (0.8, 1.25), rng) for _ in range(2000)]
    )
    left, top, right, bottom = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 400
    assert bottom.max() <= 300
    width, height = right - left, bottom - top
    area, ratio = width * height / (300 * 400), width / height
    assert 0.195 < area.min() < 0.21
    assert 0.49 < area.max() < 0.505
    assert area.mean() == pytest.approx(0.35, abs=0.01)  # uniform
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.01)  # uniform in the logarithm
    assert np.log(ratio).std() == pytest.approx(np.log(1.25) / np.sqrt(3), rel=0.05)
    # Everywhere in the image.
    assert left.min() < 5
    assert right.max() > 395


def test_an_image_that_holds_no_such_crop_gives_its_centre():
    rng = np.random.default_rng(0)
    box = decode.random_crop(10, 1000, (0.9, 1.0), (3 / 4, 4 / 3), rng)
    assert box == (493, 0, 506, 10)


def test_without_a_size_images_stay_as_they_are():
    view = decode.View(Data())
    data = encoded(PHOTO, 'PNG')
    np.testing.assert_array_equal(view.training(data, 3, np.random.default_rng(0)), PHOTO)
    np.testing.assert_array_equal(view.evaluation(PHOTO, 3), PHOTO)


@pytest.mark.parametrize(
    ('form', 'mode', 'options', 'beginning'),
    [
        ('JPEG', 'L', {}, True),
        ('JPEG', 'CMYK', {'progressive': True}, True),
        ('JPEG', 'RGB', {'icc_profile': bytes(100_000)}, False),  # before the header
        ('PNG', 'LA', {}, True),
        ('GIF', '1', {}, True),
        ('BMP', 'L', {}, True),
        ('TIFF', 'L', {}, False),  # the header may be at the end
        ('WEBP', 'RGB', {'lossless': True}, False),
    ],
)
def test_of_a_large_file_only_the_beginning_is_read_for_its_header(form, mode, options, beginning):
    noise = np.random.default_rng(0).integers(0, 256, (600, 700, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, form, **options)
    content = file.getvalue()
    file.seek(0)
    assert decode.read_header(file) == decode.header(content) == (600, 700, 3 - 2 * (mode in '1LA'))
    assert file.tell() == (2**15 if beginning else len(content))
