"""What images there are: a data set's name -> uint8 images and labels, in three splits.

digits      scikit-learn's 1,797 images; 20 % are the test split.
idx:DIR     the four gzip IDX files of the MNIST family in one directory.
tfds:NAME   a TFDS image-classification set that fits in memory (tfds_source.py).
"""

import dataclasses
import gzip
import math
import pathlib
import struct
import zlib

import numpy as np
from ml_collections import ConfigDict

from afkd_jax.errors import UserError

# The splits are the same in every run: they never depend on config.seed. NumPy promises that
# the stream of a RandomState will not change between its versions.
_SPLIT_SEED = 20200705


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
      pixels: uint8 [N, H, W, C].
      labels: int32 [N] in 0 .. num_classes - 1.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> 'Images':
        """Returns the images of these indices, in this order."""
        return Images(self.pixels[index], self.labels[index])


@dataclasses.dataclass(frozen=True)
class Info:
    """What is known of a data set without its images.

    Attributes:
      image_shape: (H, W, C).
      num_classes: at least 2.
      train: images to train on, after the validation split and the limit.
      validation: images held out of the training images; may be 0.
      test: images of the test split.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    train: int
    validation: int
    test: int

    def held_out(self) -> tuple[str, ...]:
        """Returns the splits that are evaluated: validation, where there is one, and test."""
        return ('validation', 'test') if self.validation else ('test',)

    def places(self, split: str) -> range:
        """Returns where a split's images lie when all are laid out one after the other.

        Args:
          split: 'train', 'validation' or 'test'.
        """
        ends = np.cumsum([0, self.train, self.validation, self.test]).tolist()
        index = ('train', 'validation', 'test').index(split)
        return range(ends[index], ends[index + 1])


@dataclasses.dataclass(frozen=True)
class Splits:
    """The images of a run; no image is in two of the splits."""

    train: Images
    validation: Images
    test: Images
    num_classes: int

    @property
    def info(self) -> Info:
        """Shape, classes and sizes."""
        sizes = len(self.train), len(self.validation), len(self.test)
        return Info(self.train.pixels.shape[1:], self.num_classes, *sizes)


def _held_out(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (kept, held out) indices, both in the order of one fixed permutation.

    round(fraction * N) images are held out, of every class the same fraction as nearly as can be.
    """
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(labels))
    # How far through its class each image comes, in (0, 1): the first ones are held out.
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels[order] == label)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    held = np.zeros(len(labels), bool)
    held[np.argsort(place, kind='stable')[: round(fraction * len(labels))]] = True
    return order[~held], order[held]


def _digits() -> tuple[Images, Images, int]:
    from sklearn import datasets

    digits = datasets.load_digits()
    # 0 .. 16 becomes 0 .. 240: exact in uint8.
    pixels = (digits.images * 15).astype(np.uint8)[..., None]
    images = Images(pixels, digits.target.astype(np.int32))
    rest, test = _held_out(images.labels, 0.2)
    return images.take(rest), images.take(test), 10


_IDX_FILES = (
    ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz'),
    ('t10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'),
)


def _read_idx(path: pathlib.Path, axes: int) -> np.ndarray:
    """Returns a gzip IDX file of unsigned bytes as an array with `axes` axes."""
    try:
        with gzip.open(path) as file:
            header = file.read(4 + 4 * axes)
            if header[:4] != bytes((0, 0, 8, axes)):
                raise UserError(
                    f'config.dataset: {path} starts with {header[:4].hex()}, but an IDX file of '
                    f'bytes with {axes} axes starts with 000008{axes:02x}; fetch it again'
                )
            if len(header) < 4 + 4 * axes:
                raise UserError(f'config.dataset: {path} ends in its header; fetch it again')
            shape = struct.unpack(f'>{axes}I', header[4:])
            size = math.prod(shape)
            # One byte more than announced, so that a longer file is noticed; piece by piece, so
            # that a header that claims too much costs only the memory of what its file holds.
            data = bytearray()
            while piece := file.read(min(size + 1 - len(data), 2**20)):
                data += piece
    except FileNotFoundError:
        raise UserError(
            f'config.dataset: there is no file {path}; an idx: directory holds '
            + ', '.join(name for pair in _IDX_FILES for name in pair)
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f'config.dataset: {path} cannot be read as gzip ({error}); fetch it again'
        ) from None
    if len(data) != size:
        raise UserError(
            f'config.dataset: {path} announces {"x".join(map(str, shape))} bytes but holds '
            f'{"more" if len(data) > size else len(data)}; fetch it again'
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _idx(directory: str) -> tuple[Images, Images, int]:
    folder, splits = pathlib.Path(directory).expanduser(), []
    if not folder.is_dir():
        raise UserError(
            f'config.dataset: there is no directory {folder}; name one that holds the four '
            'gzip IDX files of the MNIST family (Debian: apt-get install dataset-fashion-mnist)'
        )
    for images_name, labels_name in _IDX_FILES:
        pixels = _read_idx(folder / images_name, 3)
        labels = _read_idx(folder / labels_name, 1).astype(np.int32)
        if len(pixels) != len(labels) or len(labels) == 0:
            raise UserError(
                f'config.dataset: {folder / images_name} has {len(pixels)} images but '
                f'{labels_name} has {len(labels)} labels; they must be equally many, and some'
            )
        splits.append(Images(pixels[..., None], labels))
    train, test = splits
    num_classes = int(train.labels.max()) + 1
    if num_classes < 2 or test.labels.max() >= num_classes:
        raise UserError(
            f'config.dataset: the labels in {folder} go to {num_classes - 1} in training and '
            f'to {test.labels.max()} in test; there must be two classes, the same in both'
        )
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise UserError(
            f'config.dataset: the training images in {folder} are {train.pixels.shape[1:]} but '
            f'the test images {test.pixels.shape[1:]}; they must be alike'
        )
    return train, test, num_classes


def _train_size(
    config: ConfigDict, image_shape: tuple[int, ...], available: int, validation: int
) -> int:
    """Returns how many images are trained on, of those that the validation split leaves.

    Refuses what of config.data and config.batch_size does not fit the images.
    """
    if config.data.pad >= min(image_shape[:2]):
        raise UserError(
            f'config.data.pad: must be below {min(image_shape[:2])}, the side of the images of '
            f'{config.dataset}, but is {config.data.pad}'
        )
    if config.data.validation_fraction and not validation:
        raise UserError(
            f'config.data.validation_fraction: {config.data.validation_fraction} of {available} '
            f'training images of {config.dataset} is no image; use 0, or a larger fraction'
        )
    wanted, left = config.data.train_examples, available - validation
    if wanted > left:
        raise UserError(
            f'config.data.train_examples: must be at most {left}, the training images of '
            f'{config.dataset} without the validation split, but is {wanted}'
        )
    train = wanted or left
    if config.batch_size > train:
        raise UserError(
            f'config.batch_size: must be at most {train}, the number of training images, '
            f'but is {config.batch_size}'
        )
    return train


def load(config: ConfigDict) -> Splits:
    """Returns the images of a config's data set.

    The validation split is held out of the training images by a fixed permutation, the same
    fraction of every class; the training images stay in the permutation's order, so that the
    first n of it are a random sample.

    Raises:
      UserError: the set is not there, cannot be had, is broken, or is too small for the config.
    """
    kind, _, name = config.dataset.partition(':')
    if kind == 'digits':
        train, test, num_classes = _digits()
    elif kind == 'idx':
        train, test, num_classes = _idx(name)
    else:
        from afkd_jax.data import tfds_source

        pixels_and_labels = tfds_source.load(config, name)
        train, test = (Images(*pair) for pair in pixels_and_labels)
        num_classes = tfds_source.describe(config, name).num_classes
    kept, held = _held_out(train.labels, config.data.validation_fraction)
    kept = kept[: _train_size(config, train.pixels.shape[1:], len(train), len(held))]
    return Splits(train.take(kept), train.take(held), test, num_classes)


def info(config: ConfigDict) -> Info:
    """Returns what load() would give, without the images where their set is known to TFDS."""
    kind, _, name = config.dataset.partition(':')
    if kind != 'tfds':
        return load(config).info
    from afkd_jax.data import tfds_source

    known = tfds_source.describe(config, name)
    held = round(config.data.validation_fraction * known.train)
    train = _train_size(config, known.image_shape, known.train, held)
    return dataclasses.replace(known, train=train, validation=held)
