"""IDX files, whole and broken."""

import gzip
import struct

import numpy as np
import pytest
from conftest import tiny_config
from sklearn import datasets

from afkd_jax.data import dataset as dataset_lib
from afkd_jax.errors import UserError

TRAIN_IMAGES = 'train-images-idx3-ubyte.gz'
TRAIN_LABELS = 'train-labels-idx1-ubyte.gz'
TEST_IMAGES = 't10k-images-idx3-ubyte.gz'
TEST_LABELS = 't10k-labels-idx1-ubyte.gz'


def idx_bytes(array, magic=None, shape=None):
    shape = array.shape if shape is None else shape
    magic = bytes((0, 0, 8, len(shape))) if magic is None else magic
    return magic + struct.pack(f'>{len(shape)}I', *shape) + array.tobytes()


def write(folder, name, content):
    (folder / name).write_bytes(gzip.compress(content))


@pytest.fixture
def idx(tmp_path):
    """A directory with 70 + 20 real digits in the four files of the MNIST family."""
    digits = datasets.load_digits()
    pixels, labels = (digits.images * 15).astype(np.uint8), digits.target.astype(np.uint8)
    write(tmp_path, TRAIN_IMAGES, idx_bytes(pixels[:70]))
    write(tmp_path, TRAIN_LABELS, idx_bytes(labels[:70]))
    write(tmp_path, TEST_IMAGES, idx_bytes(pixels[70:90]))
    write(tmp_path, TEST_LABELS, idx_bytes(labels[70:90]))
    return tmp_path


def load_idx(folder):
    return dataset_lib.dataset(
        tiny_config(dataset=f'idx:{folder}', data__validation_fraction=0.0, batch_size=8)
    )


def test_idx_files_are_read(idx):
    dataset = load_idx(idx)
    digits = datasets.load_digits()
    assert dataset.info == dataset_lib.Info((8, 8, 1), tuple('0123456789'), 70, 0, 20)
    np.testing.assert_array_equal(dataset.test.examples.pixels[..., 0], digits.images[70:90] * 15)
    np.testing.assert_array_equal(dataset.test.examples.labels, digits.target[70:90])
    assert sorted(dataset.load().labels[:70]) == sorted(digits.target[:70])


BAD_IDX = {
    'missing': (TEST_LABELS, None, 'there is no file .*t10k-labels'),
    'not gzip': (TRAIN_IMAGES, b'hello', 'cannot be read as gzip'),
    'cut gzip': (TRAIN_IMAGES, gzip.compress(idx_bytes(np.zeros((70, 8, 8), np.uint8)))[:-20], ''),
    'short header': (TRAIN_LABELS, gzip.compress(b'\0\0\x08\x01\0'), 'ends in its header'),
    'empty': (TRAIN_LABELS, gzip.compress(b''), 'starts with'),
    'wrong magic': (
        TRAIN_LABELS,
        gzip.compress(idx_bytes(np.zeros(70, np.uint8), magic=bytes((0, 0, 13, 1)))),
        'starts with 00000d01, but .* 00000801',
    ),
    'labels for images': (
        TRAIN_IMAGES,
        gzip.compress(idx_bytes(np.zeros(70, np.uint8))),
        'starts with 00000801',
    ),
    'cut': (
        TRAIN_LABELS,
        gzip.compress(idx_bytes(np.zeros(60, np.uint8), shape=(70,))),
        'announces 70 bytes but holds 60',
    ),
    'too long': (
        TRAIN_LABELS,
        gzip.compress(idx_bytes(np.zeros(71, np.uint8), shape=(70,))),
        'announces 70 bytes but holds more',
    ),
    'claims all memory': (
        TRAIN_IMAGES,
        gzip.compress(idx_bytes(np.zeros(9, np.uint8), shape=(2**32 - 1,) * 3)),
        'holds 9',
    ),
    'unequal lengths': (
        TRAIN_LABELS,
        gzip.compress(idx_bytes(np.arange(69, dtype=np.uint8) % 10)),
        '70 images but .* 69 labels',
    ),
    'no images': (
        TEST_IMAGES,
        gzip.compress(idx_bytes(np.zeros((0, 8, 8), np.uint8))),
        '0 images but .* 20 labels',
    ),
    'one class': (TRAIN_LABELS, gzip.compress(idx_bytes(np.zeros(70, np.uint8))), 'two classes'),
    'foreign label': (
        TEST_LABELS,
        gzip.compress(idx_bytes(np.full(20, 10, np.uint8))),
        'the test images must have labels in 0 .. 9, but one is 10',
    ),
    'other size': (
        TEST_IMAGES,
        gzip.compress(idx_bytes(np.zeros((20, 8, 9), np.uint8))),
        r'train images are \(8, 8, 1\) but the test images \(8, 9, 1\)',
    ),
}


@pytest.mark.parametrize('name', BAD_IDX)
def test_broken_idx_files_are_rejected(name, idx):
    file, content, message = BAD_IDX[name]
    if content is None:
        (idx / file).unlink()
    else:
        (idx / file).write_bytes(content)
    with pytest.raises(UserError, match=f'config.dataset: .*{message}'):
        load_idx(idx)


def test_a_missing_directory_is_rejected(tmp_path):
    with pytest.raises(UserError, match='there is no directory .*apt-get install'):
        load_idx(tmp_path / 'nothing')
