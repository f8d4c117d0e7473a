"""What images there are: a data set's name -> labelled images, in three splits.

digits      scikit-learn's 1,797 images; 20 % are the test split.
idx:DIR     the four gzip IDX files of the MNIST family in one directory (idx_source.py).
folder:DIR  image files, train/<class>/... and val/<class>/... (folder_source.py).
tfds:NAME   a TFDS image-classification set (tfds_source.py).
"""

import dataclasses
import hashlib

import numpy as np
from ml_collections import ConfigDict

from afkd_jax import config as config_lib
from afkd_jax.data import decode
from afkd_jax.data.examples import Examples, Images, seen_shape
from afkd_jax.errors import UserError

# The splits are the same in every run: they never depend on config.seed. NumPy promises that
# the stream of a RandomState will not change between its versions.
_SPLIT_SEED = 20200705
_MOST_STEPS = 2**31 - 1  # the state's counter is an int32


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


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The images of a run by random access, in one numbering: train, validation, test.

    Attributes:
      info: sizes; of the images as the networks see them.
      view: how they see them.
      train: the set's training images.
      test: its test images.
      order: int [train + validation], of the set's training images: those that are trained on,
        then those that are held out.
    """

    info: Info
    view: decode.View
    train: Examples
    test: Examples
    order: np.ndarray

    def _at(self, place: int) -> tuple[Examples, int]:
        if place < len(self.order):
            return self.train, int(self.order[place])
        return self.test, place - len(self.order)

    def __getitem__(self, place: int) -> tuple[np.ndarray | bytes, int]:
        """Returns (image as it is stored, label); see Info.places.

        Raises:
          UserError: the label is none of the classes.
        """
        examples, index = self._at(place)
        image, label = examples[index]
        if not 0 <= label < self.info.num_classes:
            raise UserError(_wrong_label(self.name(place), label, self.info))
        return image, label

    def name(self, place: int) -> str:
        """Returns where the image is stored."""
        examples, index = self._at(place)
        return examples.name(index)

    def fingerprint(self) -> str:
        """Returns what tells these images from others without reading them, as hex."""
        whole = self.train.fingerprint(), self.test.fingerprint(), self.order.tolist()
        return hashlib.sha256(repr(whole).encode()).hexdigest()

    def load(self) -> Splits:
        """Returns all images in memory, as they are stored.

        Raises:
          UserError: one cannot be decoded, or is of another size than the others.
        """
        try:
            train, test = self.train.load(), self.test.load()
        except decode.Broken as error:
            raise UserError(
                f'config.dataset: {error}; mend or remove it, let config.data.placement=stream '
                'pass over config.data.max_corrupt such images, or resize images of many sizes by '
                'config.data.image_size'
            ) from None
        for split in (train, test):
            wrong = np.flatnonzero((split.labels < 0) | (split.labels >= self.info.num_classes))
            if len(wrong):
                raise UserError(
                    _wrong_label(split.name(wrong[0]), split.labels[wrong[0]], self.info)
                )
        kept, held = np.split(self.order, [self.info.train])
        return Splits(train.take(kept), train.take(held), test, self.info.num_classes)


def _wrong_label(name: str, label: int, info: Info) -> str:
    return (
        f'config.dataset: {name} has the label {label}, but there are {info.num_classes} classes; '
        'choose splits with labels by config.data.train_split and config.data.test_split'
    )


def _held_out(train: Examples, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (kept, held out) indices, both in the order of one fixed permutation.

    round(fraction * N) images are held out, of every class the same fraction as nearly as can be.
    """
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(train))
    if not fraction:  # nor need the labels be read
        return order, order[:0]
    labels = train.read_labels()
    # How far through its class each image comes, in (0, 1): the first ones are held out.
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels[order] == label)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    held = np.zeros(len(labels), bool)
    held[np.argsort(place, kind='stable')[: round(fraction * len(labels))]] = True
    return order[~held], order[held]


def _digits() -> tuple[Images, Images, int]:
    """Returns the images of train and of test, and the number of classes."""
    from sklearn import datasets

    digits = datasets.load_digits()
    # 0 .. 16 becomes 0 .. 240: exact in uint8.
    pixels = (digits.images * 15).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    images = Images(pixels, labels)
    rest, test = _held_out(images, 0.2)
    return images.take(rest), images.take(test), 10


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


def view(config: ConfigDict) -> decode.View:
    """Returns how the networks see the images of a config."""
    data = config.data
    return decode.View(
        data.image_size,
        tuple(data.crop_scale),
        tuple(data.crop_ratio),
        data.eval_resize,
        data.randaugment_operations,
        data.randaugment_magnitude,
    )


def _check_seen(config: ConfigDict, image_shape: tuple[int, int, int]) -> None:
    """Refuses what of config.data does not fit how the images are seen; needs no images."""
    data, channels = config.data, image_shape[2]
    if data.image_size > data.eval_resize:
        raise UserError(
            f'config.data.eval_resize: must be at least config.data.image_size, {data.image_size}, '
            f'but is {data.eval_resize}'
        )
    for field in ('image_size', 'randaugment_operations'):
        if data[field] and data.placement in ('device', 'host'):
            raise UserError(
                f"config.data.placement: must be 'stream' or 'auto' with config.data.{field}="
                f'{data[field]}, but is {data.placement!r}'
            )
    given = len(data.mean), len(data.std)
    if given == (0, 0) and data.image_size:
        raise UserError(
            'config.data.mean: must be given, like config.data.std, where images are cropped to '
            'config.data.image_size, e.g. those of ImageNet: '
            '--config.data.mean="(0.485,0.456,0.406)" --config.data.std="(0.229,0.224,0.225)"'
        )
    for field, count in zip(('mean', 'std'), given, strict=True):
        if given != (0, 0) and count != channels:
            raise UserError(
                f'config.data.{field}: {count} numbers are given for images of {channels} '
                'channels; give mean and std one number per channel, or () for both'
            )


def _info(
    config: ConfigDict,
    image_shape: tuple[int | None, int | None, int],
    num_classes: int,
    train: int,
    test: int,
) -> Info:
    """Returns what a config makes of a set of this stored shape and these sizes, if they fit."""
    shape = seen_shape(config, image_shape)
    _check_seen(config, shape)
    held = round(config.data.validation_fraction * train)
    return Info(shape, num_classes, _train_size(config, shape, train, held), held, test)


def dataset(config: ConfigDict) -> Dataset:
    """Returns the images of a config's data set, by random access.

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
        from afkd_jax.data.sources import idx as idx_source

        train, test, num_classes = idx_source.load(name)
    elif kind == 'folder':
        from afkd_jax.data.sources import folder as folder_source

        train, test, num_classes = folder_source.examples(name, bool(config.data.image_size))
    else:
        from afkd_jax.data.sources import tfds as tfds_source

        train, test, num_classes = tfds_source.examples(config, name)
    info = _info(config, train.image_shape, num_classes, len(train), len(test))
    kept, held = _held_out(train, config.data.validation_fraction)
    order = np.concatenate([kept[: info.train], held])
    return Dataset(info, view(config), train, test, order)


def load(config: ConfigDict) -> Splits:
    """Returns the images of a config's data set in memory; see dataset()."""
    return dataset(config).load()


def info(config: ConfigDict) -> Info:
    """Returns what load() would give, without the images where their set is known to TFDS."""
    kind, _, name = config.dataset.partition(':')
    if kind != 'tfds':
        return dataset(config).info
    from afkd_jax.data.sources import tfds as tfds_source

    return _info(config, *tfds_source.describe(config, name))
