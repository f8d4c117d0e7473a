"""TFDS sets, without TensorFlow and without a network."""

import hashlib
import io
import sys
import tarfile
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import tiny_config

from afkd_jax.data import dataset as dataset_lib
from afkd_jax.errors import UserError

FINE = tuple(f'fine{i}' for i in range(100))


def config(name, tmp_path, **fields):
    return tiny_config(
        dataset=f'tfds:{name}', batch_size=8, data__data_dir=str(tmp_path / 'prepared'), **fields
    )


def cifar100_archive(folder, train, test):
    """Writes an archive in the format of cifar-100-binary.tar.gz; returns its checksum entry."""
    rng = np.random.default_rng(0)
    content = {
        'coarse_label_names.txt': '\n'.join(f'coarse{i}' for i in range(20)).encode(),
        'fine_label_names.txt': '\n'.join(FINE).encode(),
    }
    pixels = {}
    for name, count in (('train', train), ('test', test)):
        # Per image: coarse label, fine label, then the red, green and blue planes.
        pixels[name] = rng.integers(0, 256, (count, 3, 32, 32), np.uint8)
        rows = [
            bytes((i % 20, i % 100)) + picture.tobytes() for i, picture in enumerate(pixels[name])
        ]
        content[f'{name}.bin'] = b''.join(rows)
    path = folder / 'cifar-100-binary.tar.gz'
    with tarfile.open(path, 'w:gz') as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(f'cifar-100-binary/{name}')
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    data = path.read_bytes()
    entry = tfds.download.checksums.UrlInfo(
        size=len(data), checksum=hashlib.sha256(data).hexdigest(), filename=path.name
    )
    return pixels, {'https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz': entry}


def test_an_archive_in_manual_dir_is_prepared_and_read(tmp_path):
    pixels, entry = cifar100_archive(tmp_path, train=30, test=10)
    builder_class = type(tfds.builder('cifar100', data_dir=tmp_path))
    ours = config('cifar100', tmp_path, data__manual_dir=str(tmp_path))
    with mock.patch.object(builder_class, 'url_infos', entry):
        dataset = dataset_lib.dataset(ours)
    assert dataset.info == dataset_lib.Info((32, 32, 3), FINE, 27, 3, 10)

    # The set is shuffled: compare as sets of (image, label).
    images = dataset.load()
    for part, planes in (
        (images.take(np.arange(30)), pixels['train']),
        (images.take(np.arange(30, 40)), pixels['test']),
    ):
        expected = {(p.transpose(1, 2, 0).tobytes(), i % 100) for i, p in enumerate(planes)}
        pairs = zip(part.pixels, part.labels, strict=True)
        assert {(picture.tobytes(), int(label)) for picture, label in pairs} == expected
    # Prepared once: now neither the archive nor the patch is needed, and the sizes are known.
    (tmp_path / 'cifar-100-binary.tar.gz').unlink()
    assert len(dataset_lib.dataset(ours).load()) == 40
    assert dataset_lib.info(ours) == dataset.info
    # Labels are read of the images that are used, in the order in which they are stored.
    images, read = dataset.train.examples, []
    labels = images.read_labels(np.arange(30))
    with mock.patch.object(
        type(images), '__getitem__', lambda self, i: (read.append(i), labels[i])
    ):
        np.testing.assert_array_equal(images.read_labels(np.array([7, 2, 9])), labels[[7, 2, 9]])
    assert read == [2, 7, 9]


def test_shapes_and_sizes_are_known_without_data(tmp_path):
    info = dataset_lib.info(config('cifar100', tmp_path, data__validation_fraction=0.1))
    assert info.sizes() == {
        'image_shape': (32, 32, 3),
        'num_classes': 100,
        'train': 45_000,
        'validation': 5_000,
        'test': 10_000,
    }


def test_a_set_that_cannot_be_had_says_what_to_do(tmp_path):
    with (
        mock.patch('socket.getaddrinfo', side_effect=OSError('no such host')),
        mock.patch('urllib.request.getproxies', return_value={}),
        pytest.raises(UserError, match=r'not prepared in .*cifar-100-binary.*manual_dir'),
    ):
        dataset_lib.dataset(config('cifar100', tmp_path))


def test_a_broken_archive_is_rejected(tmp_path):
    _, entry = cifar100_archive(tmp_path, train=3, test=3)
    path = tmp_path / 'cifar-100-binary.tar.gz'
    path.write_bytes(path.read_bytes()[:-9])
    builder_class = type(tfds.builder('cifar100', data_dir=tmp_path))
    with (
        mock.patch.object(builder_class, 'url_infos', entry),
        mock.patch.object(
            tfds.core.download.download_manager.DownloadManager,
            '_download',
            side_effect=OSError('no network'),
        ),
        pytest.raises(UserError, match=r'has [\d,]+ bytes, but the archive has'),
    ):
        dataset_lib.dataset(config('cifar100', tmp_path, data__manual_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('cifar_100', 'TFDS has no set called "cifar_100"; did you mean "cifar100"'),
        ('coco', 'cannot offer "coco" here: .*tensorflow'),
        ('math_dataset', 'not an image-classification set'),
        ('div2k', 'not an image-classification set'),
        ('celeb_a', 'no .image, label. pair'),
        ('cifar100:9.9.9', 'TFDS'),
    ],
)
def test_sets_that_do_not_fit_are_rejected(name, message, tmp_path):
    with pytest.raises(UserError, match=f'config.dataset: .*{message}'):
        dataset_lib.info(config(name, tmp_path))


def test_images_of_many_sizes_get_the_size_of_the_config(tmp_path):
    fields = {'data__validation_fraction': 0.0, 'data__image_size': 224}
    fields |= {'data__mean': (0.5,) * 3, 'data__std': (0.2,) * 3}
    known = dataset_lib.info(config('imagenet2012', tmp_path, **fields))
    assert (known.image_shape, known.num_classes) == ((224, 224, 3), 1000)
    assert known.classes[0] == 'n01440764'
    assert (known.train, known.validation, known.test) == (1_281_167, 0, 50_000)
    with pytest.raises(UserError, match=r'config.data.image_size: .* many sizes; give the one'):
        dataset_lib.info(config('imagenet2012', tmp_path))


def test_no_tensorflow_and_no_pytorch():
    assert 'tensorflow' not in sys.modules
    assert 'torch' not in sys.modules
