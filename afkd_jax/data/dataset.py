"""Data sets: the images that config.dataset names, in three splits and one numbering.

Where the images come from is data/sources. Imports no JAX.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from afkd_jax import config as config_lib
from afkd_jax import registry
from afkd_jax.config import Config
from afkd_jax.data import decode
from afkd_jax.data.examples import Examples, Images, Shape, digest, input_shape
from afkd_jax.data.sources import Source
from afkd_jax.errors import UserError, field_error

# The splits are the same in every run: they never depend on config.seed. NumPy promises that
# the stream of a RandomState will not change between its versions.
_SPLIT_SEED = 20200705
_MOST_STEPS = 2**31 - 1  # the state's counter is an int32


@dataclasses.dataclass(frozen=True)
class Info:
    """A data set without its images: the networks' input shape, class names and split sizes."""

    image_shape: tuple[int, int, int]  # (H, W, C)
    classes: tuple[str, ...]
    train: int  # without the validation split
    validation: int  # may be 0
    test: int

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def examples(self) -> int:
        """The number of images of all splits."""
        return self.train + self.validation + self.test

    def held_out(self) -> tuple[str, ...]:
        """Returns the splits that are evaluated: validation, if there is one, and test."""
        return ('validation', 'test') if self.validation else ('test',)

    def indices(self, split: str) -> range:
        """Returns the indices of 'train', 'validation' or 'test', which follow each other."""
        start = {'train': 0, 'validation': self.train, 'test': self.train + self.validation}[split]
        return range(start, start + getattr(self, split))

    def sizes(self) -> dict[str, Any]:
        """Returns the fields, with the number of classes in place of their names."""
        fields = dataclasses.asdict(self)
        return {'num_classes': len(fields.pop('classes')), **fields}


class Part(NamedTuple):
    """A split: some images of a source, in this order."""

    examples: Examples
    indices: np.ndarray  # int [N]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The images of a run by random access, numbered: train, validation, test.

    Attributes:
      notes: lines for the user about the images.
    """

    info: Info
    view: decode.View
    train: Part
    validation: Part
    test: Part
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        """The splits, in the order in which their images are numbered."""
        return self.train, self.validation, self.test

    def _locate(self, index: int) -> tuple[Examples, int]:
        for examples, indices in self.parts:
            if index < len(indices):
                return examples, int(indices[index])
            index -= len(indices)
        raise IndexError(index)

    def __getitem__(self, index: int) -> tuple[decode.Stored, int]:
        """Returns (image as it is stored, label); a label out of range is a UserError."""
        examples, stored = self._locate(index)
        image, label = examples[stored]
        self._check_labels(index, np.array([label]))
        return image, label

    def name(self, index: int) -> str:
        """Returns where the image is stored."""
        examples, stored = self._locate(index)
        return examples.name(stored)

    def fingerprint(self) -> str:
        """Returns a hash that differs for other images, without reading them, as hex."""
        return digest([(part.examples.fingerprint(), part.indices.tolist()) for part in self.parts])

    def load(self) -> Images:
        """Returns all in memory; UserError: one cannot be decoded, or differs in size."""
        count, start = self.info.examples, 0
        images = Images(
            np.empty((count, *self.info.image_shape), np.uint8), np.empty(count, np.int32)
        )
        for examples, indices in self.parts:
            rows = slice(start, start + len(indices))
            try:
                examples.load(indices, images.pixels[rows], images.labels[rows])
            except decode.DecodeError as error:
                raise UserError(
                    f'config.dataset: {error}; repair or remove it, let config.data.placement='
                    'stream skip up to config.data.max_corrupt such images, or resize images of '
                    'many sizes by config.data.image_size'
                ) from None
            start = rows.stop
        self._check_labels(0, images.labels)
        return images

    def _check_labels(self, first: int, labels: np.ndarray) -> None:
        """Rejects labels, of the images from index `first` on, that are out of range."""
        count = self.info.num_classes
        if labels.min() >= 0 and labels.max() < count:
            return
        wrong = np.flatnonzero((labels < 0) | (labels >= count))[0]
        raise UserError(
            f'config.dataset: {self.name(first + int(wrong))} has the label {labels[wrong]}, but '
            f'there are {count} classes; choose splits with labels, of a TFDS set by '
            'config.data.train_split and config.data.test_split'
        )


def fixed_permutation(count: int) -> np.ndarray:
    """Returns a permutation of 0 .. count - 1 that is the same in every run."""
    return np.random.RandomState(_SPLIT_SEED).permutation(count)


def stratified_split(
    examples: Examples, fraction: float, used: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (remaining, held out) indices, both in the order of one fixed permutation.

    Of the first `used` images of the permutation (0: all), round(fraction * used) are held out, of
    every class nearly the same fraction. The other images are in neither part.
    """
    order = fixed_permutation(len(examples))[: used or None]
    if not fraction:  # reading the labels may be slow
        return order, order[:0]
    labels = examples.read_labels(order)
    # The position of each image in its class, in (0, 1): the first ones are held out.
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    held = np.zeros(len(labels), bool)
    held[np.argsort(position, kind='stable')[: round(fraction * len(labels))]] = True
    return order[~held], order[held]


def _info(
    config: Config,
    image_shape: Shape,
    classes: tuple[str, ...],
    available: int,
    test: int,
    validation: int = 0,
) -> Info:
    """Returns the info of a set of this stored shape and these sizes, if the config fits it.

    `validation` is the size of the set's own validation split, 0 if it has none.
    """
    shape = input_shape(config, image_shape)
    _check_view(config, shape[2])
    data, name, side = config.data, config.dataset, min(shape[:2])
    if data.pad >= side:
        raise field_error('data.pad', f'below {side}, the side of the images of {name}', data.pad)
    if data.validation_fraction and validation:
        rule = f'0, as {name} has a validation split of its own, of {validation} images'
        raise field_error('data.validation_fraction', rule, data.validation_fraction)
    for field, wanted, most, noun in (
        ('train_examples', data.train_examples, available, 'training'),
        ('test_examples', data.test_examples, test, 'test'),
    ):
        if wanted > most:
            rule = f'at most {most}, the number of {noun} images of {name}'
            raise field_error(f'data.{field}', rule, wanted)
    used = data.train_examples or available
    held = round(data.validation_fraction * used)
    if data.validation_fraction and not held:
        raise UserError(
            f'config.data.validation_fraction: {data.validation_fraction} of {used} '
            f'training images of {name} is no image; use 0, or a larger fraction'
        )
    train = used - held
    if not train or train < config.batch_size <= used:
        raise UserError(
            f'config.data.validation_fraction: {data.validation_fraction} of {used} training '
            f'images of {name} leaves {train} to train on, fewer than '
            f'config.batch_size={config.batch_size}; lower the fraction or the batch size'
        )
    if config.batch_size > train:
        rule = f'at most {train}, the number of training images'
        if held:
            rule += f' with config.data.validation_fraction={data.validation_fraction}'
        raise field_error('batch_size', rule, config.batch_size)
    steps = config_lib.steps_in(config.epochs, train, config.batch_size)
    if steps > _MOST_STEPS:
        raise UserError(
            f'config.epochs: {config.epochs} epochs of {train} images are {steps} steps, but at '
            f'most {_MOST_STEPS} can be counted; lower it'
        )
    return Info(shape, classes, train, validation or held, data.test_examples or test)


def _check_view(config: Config, channels: int) -> None:
    data = config.data
    if data.image_size > data.eval_resize:
        rule = f'at least config.data.image_size, {data.image_size}'
        raise field_error('data.eval_resize', rule, data.eval_resize)
    for field in ('image_size', 'randaugment_operations'):
        if getattr(data, field) and data.placement in ('device', 'host'):
            rule = f"'stream' or 'auto' with config.data.{field}={getattr(data, field)}"
            raise field_error('data.placement', rule, data.placement)
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


def _source(config: Config) -> Source:
    # config.dataset is NAME or NAME:ARGUMENT.
    name, colon, argument = config.dataset.partition(':')
    if not registry.SOURCES.find(name + colon):
        if registry.SOURCES.find(f'{name}:'):
            raise UserError(f'config.dataset: "{name}" needs an argument, as in {name}:ARGUMENT')
        if registry.SOURCES.find(name):
            raise UserError(f'config.dataset: "{name}" takes no argument; use {name}')
    tfds = f'; a set of TensorFlow Datasets is tfds:{name}'
    source = registry.SOURCES.get(name + colon, also=tfds)(config, argument)
    if not isinstance(source, Source):
        kind = type(source).__name__
        raise UserError(f'config.dataset: the source "{name}" must return a Source, not a {kind}')
    return source


def dataset(config: Config) -> Dataset:
    """Returns the images of a config's data set, by random access.

    The first config.data.train_examples training images of a fixed permutation are used. Unless
    the source has a validation split, it is held out of them, the same fraction of every class. All
    stay in the order of the permutation. The first config.data.test_examples test images of another
    are used, in the order in which they are stored.

    Raises:
      UserError: the set is unknown, unavailable, broken, or too small for the config.
    """
    source = _source(config)
    sizes = len(source.train), len(source.test), len(source.validation or ())
    info = _info(config, source.train.image_shape, source.classes, *sizes)
    train, held = stratified_split(
        source.train, config.data.validation_fraction, config.data.train_examples
    )
    validation = Part(source.train, held)
    if source.validation is not None:
        validation = Part(source.validation, np.arange(len(source.validation)))
    return Dataset(
        info,
        decode.View(config.data),
        Part(source.train, train),
        validation,
        Part(source.test, np.sort(fixed_permutation(len(source.test))[: info.test])),
        source.notes,
    )


def info(config: Config) -> Info:
    """Returns dataset(config).info, without images where TFDS knows the set.

    Before such a set is prepared, the names of its classes may be their numbers.
    """
    name, _, argument = config.dataset.partition(':')
    if name != 'tfds' or not argument:
        return dataset(config).info
    from afkd_jax.data.sources import tfds

    return _info(config, *tfds.describe(config, argument))
