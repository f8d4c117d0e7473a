"""The registry of sources, the names of classes, and one's own sources."""

import pathlib
import subprocess
import sys

import idx_test
import numpy as np
import pytest
import stream_test
import tfds_test
from conftest import tiny_config

from afkd_jax import registry
from afkd_jax.data import dataset as dataset_lib
from afkd_jax.data.dataset import Images, Source
from afkd_jax.data.examples import Examples
from afkd_jax.errors import UserError

idx, folder = idx_test.idx, stream_test.folder


def test_the_built_in_sources_are_registered():
    assert {'digits', 'idx:', 'folder:', 'tfds:'} <= set(registry.SOURCES.names())


@pytest.mark.parametrize('name', ['digits', 'idx', 'folder', 'tfds'])
def test_every_source_names_its_classes(name, request):
    fields = {'data__validation_fraction': 0.0, 'batch_size': 8}
    if name == 'folder':
        fields['data__image_size'] = 8
        fields |= {'data__mean': (0.3,) * 3, 'data__std': (0.3,) * 3, 'data__pad': 0}
    argument = {
        'digits': lambda: '',
        'idx': lambda: f':{request.getfixturevalue("idx")}',
        'folder': lambda: f':{request.getfixturevalue("folder")}',
        'tfds': lambda: ':fashion_mnist',
    }[name]()
    classes = dataset_lib.info(tiny_config(dataset=name + argument, **fields)).classes
    assert classes[2] == {'folder': 'class 2', 'tfds': 'Pullover'}.get(name, '2')
    assert len(classes) == 10


def test_the_names_in_a_prepared_tfds_set_are_read(tmp_path, monkeypatch):
    _, entry = tfds_test.cifar100_archive(tmp_path, train=30, test=10)
    builder = type(tfds_test.tfds.builder('cifar100', data_dir=tmp_path))
    monkeypatch.setattr(builder, 'url_infos', entry)
    config = tfds_test.config('cifar100', tmp_path, data__manual_dir=str(tmp_path))
    assert dataset_lib.info(config).classes == tuple(map(str, range(100)))
    assert dataset_lib.dataset(config).info.classes == tfds_test.FINE
    assert dataset_lib.info(config).classes == tfds_test.FINE


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('cifar10', 'there is no source "cifar10".*; a set of TensorFlow Datasets is tfds:cifar10'),
        ('digit', 'there is no source "digit"; did you mean "digits"'),
        ('folder', '"folder" needs an argument, as in folder:ARGUMENT'),
        ('tfds', '"tfds" needs an argument'),
        ('digits:x', '"digits" takes no argument; use digits'),
    ],
)
def test_unknown_sources_are_rejected(name, message):
    for function in (dataset_lib.dataset, dataset_lib.info):
        with pytest.raises(UserError, match=f'^config.dataset: {message}'):
            function(tiny_config(dataset=name))


def images(count, **fields):
    rng = np.random.default_rng(count)
    pixels = rng.integers(0, 256, (count, 8, 8, 1), np.uint8)
    return Images(**{'pixels': pixels, 'labels': np.arange(count, dtype=np.int32) % 3, **fields})


@pytest.fixture
def register(monkeypatch):
    """Returns a function that registers a source under a name for one test."""
    registry.SOURCES.names()  # the built-in ones first
    monkeypatch.setattr(registry.SOURCES, '_parts', dict(registry.SOURCES._parts))
    return lambda name, function: registry.register_source(name)(function)


def test_ones_own_source_is_used(register):
    def own(config, argument):
        return Source(images(int(argument)), images(5), ('a', 'b', 'c'))

    register('own:', own)
    config = tiny_config(dataset='own:40', batch_size=8, data__validation_fraction=0.1)
    dataset = dataset_lib.dataset(config)
    assert dataset.info == dataset_lib.Info((8, 8, 1), ('a', 'b', 'c'), 36, 4, 5)
    assert dataset_lib.info(config) == dataset.info
    np.testing.assert_array_equal(dataset.load().pixels[40:], images(5).pixels)


def test_ones_own_validation_split_is_used(register):
    def own(config, argument):
        return Source(images(40), images(5), ('a', 'b', 'c'), validation=images(7))

    register('own', own)
    fields = {'dataset': 'own', 'batch_size': 8}
    dataset = dataset_lib.dataset(tiny_config(**fields, data__validation_fraction=0.0))
    assert dataset.info == dataset_lib.Info((8, 8, 1), ('a', 'b', 'c'), 40, 7, 5)
    np.testing.assert_array_equal(dataset.load().pixels[40:47], images(7).pixels)


class Lazy(Examples):
    """Images that are not in memory, all of them with label 3."""

    image_shape = (8, 8, 1)

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return np.zeros(self.image_shape, np.uint8), 3

    def read_labels(self, indices):
        return np.full(len(indices), 3, np.int32)

    def name(self, index):
        return f'lazy image {index}'

    def fingerprint(self):
        return ''


NONE = {'pixels': np.zeros((0, 8, 8, 1), np.uint8), 'labels': np.zeros(0, np.int32)}
WRONG = {
    'label too large': (
        {'labels': np.full(20, 3, np.int32)},
        r'must have labels in 0 .. 2, but one is 3',
    ),
    'label below 0': ({'labels': np.full(20, -1, np.int32)}, 'but one is -1'),
    'dtype of labels': ({'labels': np.zeros(20, np.int64)}, r'labels int32\[N\], but have int64'),
    'dtype of pixels': ({'pixels': np.zeros((20, 8, 8, 1))}, r'uint8\[N, H, W, C\], but .*float64'),
    'no channels': ({'pixels': np.zeros((20, 8, 8), np.uint8)}, r'but have uint8\[20, 8, 8\]'),
    'two channels': ({'pixels': np.zeros((20, 8, 8, 2), np.uint8)}, '1 or 3 channels, but have 2'),
    'lengths': ({'labels': np.zeros(19, np.int32)}, 'are 20, but have 19 labels'),
    'empty': (NONE, 'are none'),
}


@pytest.mark.parametrize('name', WRONG)
@pytest.mark.parametrize('split', ['train', 'test', 'validation'])
def test_wrong_images_of_a_source_are_rejected(name, split, register):
    fields, message = WRONG[name]

    def own(config, argument):
        right = {name: images(20) for name in ('train', 'test', 'validation')}
        return Source(**right | {split: images(20, **fields)}, classes=('a', 'b', 'c'))

    register('own', own)
    with pytest.raises(UserError, match=f'^config.dataset: the {split} images .*{message}'):
        dataset_lib.dataset(tiny_config(dataset='own', batch_size=8))


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        (lambda: (images(20), images(5)), 'source "own" must return a Source, not a tuple'),
        (lambda: Source(images(20), [1, 2], 'abc'), 'must be Examples, .* are a list'),
        (lambda: Source(images(20), images(5), ('a',)), 'two classes are needed, but there are 1'),
        (
            lambda: Source(images(20), images(5, pixels=np.zeros((5, 9, 8, 1), np.uint8)), 'abc'),
            'train images are .8, 8, 1. but the test images .9, 8, 1.',
        ),
    ],
)
def test_a_wrong_source_is_rejected(source, message, register):
    register('own', lambda config, argument: source())
    with pytest.raises(UserError, match=f'^config.dataset: .*{message}'):
        dataset_lib.dataset(tiny_config(dataset='own', batch_size=8))


def test_labels_that_are_not_in_memory_are_checked_when_they_are_read(register):
    register('own', lambda config, argument: Source(Lazy(), Lazy(), ('a', 'b', 'c')))
    fields = {'batch_size': 8, 'data__validation_fraction': 0.0}
    dataset = dataset_lib.dataset(tiny_config(dataset='own', **fields))
    for read in (dataset.load, lambda: dataset[0]):
        with pytest.raises(UserError, match=r'lazy image \d+ has the label 3, but .* 3 classes'):
            read()


def test_importing_data_sets_is_quick():
    # Neither JAX nor what a single source needs: a config file that registers a source imports it.
    program = 'import sys, afkd_jax.data.dataset; print(*sys.modules)'
    root = pathlib.Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, '-c', program], cwd=root, capture_output=True, text=True, check=True
    )
    assert not {'jax', 'sklearn', 'tensorflow_datasets', 'grain'} & {*result.stdout.split()}
