"""TensorFlow Datasets without TensorFlow: sets prepared as array_record, read by random access."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore
from tensorflow_datasets.core import constants

from afkd_jax import paths
from afkd_jax.config import Config
from afkd_jax.data import decode
from afkd_jax.data.examples import Examples, Shape, digest, input_shape
from afkd_jax.data.sources import Source, tfds_prepare
from afkd_jax.errors import UserError, field_error, first_line, nearest

# TFDS learns the size of a set only when it prepares it; these are published (train, test), so
# that `describe` works before that. Training counts what it has read. Of ImageNet the second is
# the validation split: its test images have no public labels.
_PUBLISHED_SIZES = {
    **dict.fromkeys(('cifar10', 'cifar100'), (50_000, 10_000)),
    **dict.fromkeys(('mnist', 'fashion_mnist', 'kmnist'), (60_000, 10_000)),
    'imagenet2012': (1_281_167, 50_000),
    'stl10': (5_000, 8_000),
    'svhn_cropped': (73_257, 26_032),
}


_UNREADABLE = -1  # the label of a damaged record


class _Set:
    """A TFDS set: its builder, its image and label features, and the shape of stored images."""

    def __init__(self, config: Config, name: str):
        self.config, self.name = config, name
        self.builder: Any = _builder(config, name)
        keys, features = self.builder.info.supervised_keys, self.builder.info.features
        if not keys or len(keys) != 2 or not all(isinstance(key, str) for key in keys):
            raise UserError(f'config.dataset: tfds:{name} has no (image, label) pair to learn from')
        self.image_key, self.label_key = keys
        image, label = (features[key] for key in keys)
        if not (
            isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel)
        ):
            raise UserError(f'config.dataset: tfds:{name} is not an image-classification set')
        shape, dtype = tuple(image.shape), np.dtype(image.np_dtype)  # pyright: ignore
        height, width, channels = shape
        if channels not in (1, 3) or dtype != np.uint8:
            raise UserError(
                f'config.dataset: the images of tfds:{name} are {shape} of {dtype}; to be trained '
                'on they must be uint8, grey or RGB'
            )
        sized = height is not None and width is not None
        self.image_shape: Shape = (height, width, channels) if sized else (None, None, channels)
        self.classes = tuple(label.names)

    def split_names(self) -> tuple[str, str]:
        """Returns the splits of a prepared set to train on and to test on."""
        splits, data = self.builder.info.splits, self.config.data
        test = 'validation' if 'test' not in splits and 'validation' in splits else 'test'
        names = data.train_split or 'train', data.test_split or test
        for field, wanted in zip(('train_split', 'test_split'), names, strict=True):
            try:
                count = splits[wanted].num_examples
            except Exception as error:  # TFDS raises several types for what it cannot find
                raise UserError(
                    f'config.data.{field}: tfds:{self.name} has no split "{wanted}", but '
                    f'{", ".join(splits)} ({first_line(error)})'
                ) from error
            if not count:
                raise UserError(f'config.data.{field}: "{wanted}" of tfds:{self.name} has no image')
        return names


def _builder(config: Config, name: str) -> tfds.core.DatasetBuilder:
    # Which splits exist is known only of prepared sets, but their spelling can be checked now.
    for field in ('train_split', 'test_split'):
        value = getattr(config.data, field)
        try:
            tfds.core.ReadInstruction.from_spec(value or 'train')
        except Exception as error:  # of several types
            rule = f"a split as 'train[:90%]' ({first_line(error)})"
            raise field_error(f'data.{field}', rule, value) from error
    # Without a home directory TFDS would put its default, which has a ~ then, where we are.
    where = config.data.data_dir or constants.DATA_DIR
    folder = paths.directory('config.data.data_dir', where)
    try:
        return tfds_prepare.builder(name, folder if config.data.data_dir else None)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(
            f'config.dataset: TFDS has no set called "{name}"{nearest(name, known)}'
        ) from None
    except Exception as error:  # whatever a builder's constructor, and its imports, raise
        raise UserError(
            f'config.dataset: TFDS cannot offer "{name}" here: {first_line(error)}; '
            f'choose another set, or {tfds_prepare.elsewhere(name)}'
        ) from error


def describe(config: Config, name: str) -> tuple[Shape, tuple[str, ...], int, int]:
    """Returns stored shape, class names, and the sizes of train and test; needs no data on disk."""
    found = _Set(config, name)
    splits, data, key = found.builder.info.splits, config.data, found.builder.name
    if splits:
        train, test = (splits[split].num_examples for split in found.split_names())
    elif (
        key in _PUBLISHED_SIZES
        and data.train_split in ('', 'train')
        and data.test_split in ('', 'validation' if key == 'imagenet2012' else 'test')
    ):
        train, test = _PUBLISHED_SIZES[key]
    else:
        raise UserError(
            f'config.dataset: the size of tfds:{name}, or of the splits that '
            'config.data.train_split and test_split name, is not known before it is prepared; run '
            '--mode prepare first'
        )
    return found.image_shape, found.classes, train, test


class _Split(Examples):
    """One split of a prepared set; its images are as they are stored."""

    def __init__(self, of: _Set, split: str):
        self.image_shape = of.image_shape
        self._keys = of.image_key, of.label_key
        self._source = of.builder.as_data_source(
            split=split, decoders={of.image_key: tfds.decode.SkipDecoding()}
        )
        # Which records of which files form the split: filename, skip, take.
        self._files: list[Any] = of.builder.info.splits[split].file_instructions
        self._full_name = of.builder.info.full_name

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        image, label = self._keys
        try:
            example = self._source[index]
        except Exception as error:  # array_record raises RuntimeErrors, Python's parser others
            raise decode.DecodeError(
                f'it cannot be read; copy the file again, or delete it with its directory and '
                f'prepare the set anew ({first_line(error)})'
            ) from error
        return example[image], int(example[label])

    def read_labels(self, indices: np.ndarray) -> np.ndarray:
        labels = np.empty(len(indices), np.int32)
        for row in np.argsort(indices).tolist():  # in the order in which they are stored
            try:
                labels[row] = self[int(indices[row])][1]
            except decode.DecodeError:
                labels[row] = _UNREADABLE  # reported where its image is read
        return labels

    def name(self, index: int) -> str:
        for file in self._files:
            if index < file.take:
                return f'record {file.skip + index} of {file.filename}'
            index -= file.take
        raise IndexError(index)

    def fingerprint(self) -> str:
        """Returns a hash of name, version and files with their sizes, which TFDS never rewrites."""
        files = [
            (os.path.basename(file.filename), file.skip, file.take, os.stat(file.filename).st_size)
            for file in self._files
        ]
        return digest((self._full_name, files))


def _prepared(config: Config, name: str, log: Callable[[str], None]) -> _Set:
    found = _Set(config, name)
    input_shape(config, found.image_shape)  # before a long download
    path = pathlib.Path(found.builder.data_path)
    if found.builder.is_prepared():
        log(f'{path}: is prepared already')
        return found
    downloads = found.builder.data_dir_root / 'downloads'
    log(f'{path}: is being prepared; downloaded files stay in {downloads}')
    tfds_prepare.prepare(found.builder, config, name)
    return _Set(config, name)


def prepare(config: Config, name: str, log: Callable[[str], None]) -> pathlib.Path:
    """Prepares a set if it is not prepared yet, checks its files, and returns its directory.

    Raises:
      UserError: see source(); or a file is missing, cut, or has another number of records.
    """
    builder = _prepared(config, name, log).builder
    for split in builder.info.splits.values():
        for path, count in zip(split.filepaths, split.shard_lengths, strict=True):
            try:
                found = array_record_module.ArrayRecordReader(str(path)).num_records()
            except RuntimeError as error:
                found = first_line(error)
            if found != count:
                raise UserError(
                    f'config.dataset: {path} should have {count} records, but has {found}; copy '
                    f'the file again, or delete {builder.data_path} and prepare the set anew'
                )
    return pathlib.Path(builder.data_path)


def source(config: Config, argument: str) -> Source:
    """Returns the set with this TFDS name; a set that is not prepared yet is prepared first.

    Raises:
      UserError: the set is unknown, unavailable, or not image classification; with a remedy.
    """
    found = _prepared(config, argument, lambda message: None)
    train, test = (_Split(found, split) for split in found.split_names())
    return Source(train, test, found.classes)
