"""What images there are: a data set's name -> uint8 images and labels, in three splits.

digits      scikit-learn's 1,797 images; 20 % are the test split.
idx:DIR     the four gzip IDX files of the MNIST family in one directory (idx_source.py).
tfds:NAME   a TFDS image-classification set that fits in memory (tfds_source.py).
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from afkd_jax import config as config_lib
from afkd_jax.errors import UserError

# The splits are the same in every run: they never depend on config.seed. NumPy promises that
# the stream of a RandomState will not change between its versions.
_SPLIT_SEED = 20200705
_MOST_STEPS = 2**31 - 1  # the state's counter is an int32


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


def _digits() -> tuple[tuple, tuple, int]:
    """Returns (pixels, labels) of train and of test, and the number of classes."""
    from sklearn import datasets

    digits = datasets.load_digits()
    # 0 .. 16 becomes 0 .. 240: exact in uint8.
    pixels = (digits.images * 15).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    rest, test = _held_out(labels, 0.2)
    return (pixels[rest], labels[rest]), (pixels[test], labels[test]), 10


def _train_size(
    config: ConfigDict, image_shape: tuple[int, ...], available: int, validation: int
) -> int:
    """Returns how many images are trained on, of those that the validation split leaves.

    Refuses what of config.data, config.batch_size and config.epochs does not fit the images.
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
    steps = config_lib.steps_in(config.epochs, train, config.batch_size)
    if steps > _MOST_STEPS:
        raise UserError(
            f'config.epochs: {config.epochs} epochs of {train} images are {steps} steps, but at '
            f'most {_MOST_STEPS} can be counted; lower it'
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
        from afkd_jax.data import idx_source

        train, test, num_classes = idx_source.load(name)
    else:
        from afkd_jax.data import tfds_source

        train, test, num_classes = tfds_source.load(config, name)
    train, test = Images(*train), Images(*test)
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
