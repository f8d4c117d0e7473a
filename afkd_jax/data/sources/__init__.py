"""Sources: where a data set's images come from; one module per built-in source.

digits      scikit-learn's 1,797 images; 20 % are the test split.
idx:DIR     the four gzip IDX files of the MNIST family in one directory.
folder:DIR  image files in DIR/train/CLASS/..., DIR/val/CLASS/... and DIR/test/CLASS/...
tfds:NAME   an image-classification set of TensorFlow Datasets.

Register your own with `register_source`: a function (config, argument) -> Source.
"""

import dataclasses
import importlib

import numpy as np

from afkd_jax.config import Config
from afkd_jax.data.examples import Examples, Images
from afkd_jax.errors import UserError
from afkd_jax.registry import register_source


@dataclasses.dataclass(frozen=True)
class Source:
    """The images and the class names of a data set; wrong types, shapes or values: UserError.

    Attributes:
      notes: lines for the user about the images.
    """

    train: Examples
    test: Examples
    classes: tuple[str, ...]
    validation: Examples | None = None  # None: config.data.validation_fraction of `train`
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if len(self.classes) < 2:
            raise UserError(
                f'config.dataset: two classes are needed, but there are {len(self.classes)}'
            )
        splits = {'train': self.train, 'test': self.test}
        if self.validation is not None:
            splits['validation'] = self.validation
        for split, examples in splits.items():
            if fault := _fault(examples, len(self.classes)):
                raise UserError(f'config.dataset: the {split} images {fault}')
            if examples.image_shape != self.train.image_shape:
                raise UserError(
                    f'config.dataset: the train images are {self.train.image_shape} but the '
                    f'{split} images {examples.image_shape}; they must have the same shape'
                )


def _fault(examples: Examples, num_classes: int) -> str | None:
    """Returns what is wrong with the images of a split; None: nothing."""
    if not isinstance(examples, Examples):
        return f'must be Examples, as Images(pixels, labels), but are a {type(examples).__name__}'
    if isinstance(examples, Images):
        fields = ('pixels', np.uint8, 'N, H, W, C'), ('labels', np.int32, 'N')
        for name, dtype, axes in fields:
            array = np.asarray(getattr(examples, name))
            if array.dtype != dtype or array.ndim != len(axes.split()):
                have = f'{array.dtype}{list(array.shape)}'
                return f'must have {name} {np.dtype(dtype)}[{axes}], but have {have}'
        if len(examples.pixels) != len(examples.labels):
            return f'are {len(examples.pixels)}, but have {len(examples.labels)} labels'
        wrong = examples.labels[(examples.labels < 0) | (examples.labels >= num_classes)]
        if len(wrong):
            return f'must have labels in 0 .. {num_classes - 1}, but one is {wrong[0]}'
    if not len(examples):
        return 'are none; at least one is needed'
    if examples.image_shape[2] not in (1, 3):
        return f'must have 1 or 3 channels, but have {examples.image_shape[2]}'
    return None


def _register(name: str) -> None:
    """Registers a built-in source; its module is imported when it is used, to start quickly."""

    @register_source(name)
    def source(config: Config, argument: str) -> Source:
        module = importlib.import_module(f'{__name__}.{name.rstrip(":")}')
        return module.source(config, argument)


for _name in ('digits', 'idx:', 'folder:', 'tfds:'):
    _register(_name)
