"""The run directory as an artefact: what a reader needs who has no images of the run.

`images.json` describes the images: data set, classes, shape, mean and standard deviation.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from afkd_jax import config as config_lib
from afkd_jax.checkpoints.files import write_json
from afkd_jax.config import Config
from afkd_jax.data.dataset import Info
from afkd_jax.errors import UserError

_NAME = 'images.json'


@dataclasses.dataclass(frozen=True)
class ImageFacts:
    """What is known of a run's images.

    Attributes:
      info: shape, classes and sizes.
      mean: per channel, of training pixels in 0 .. 1, by which inputs are standardised.
      std: likewise.
    """

    dataset: str
    info: Info
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, config: Config, info: Info, mean_std: tuple[Any, Any]) -> 'ImageFacts':
        """Returns the facts of a pipeline's images; mean and std are float32 [C]."""
        mean, std = (tuple(np.asarray(values).tolist()) for values in mean_std)
        return cls(config.dataset, info, mean, std)

    def to_json(self) -> dict[str, Any]:
        """Returns one flat object, as JSON has it."""
        values = {'dataset': self.dataset, **dataclasses.asdict(self.info)}
        return json.loads(json.dumps(values | {'mean': self.mean, 'std': self.std}))

    def write(self, workdir: pathlib.Path, only_missing: bool = False) -> None:
        """Writes images.json."""
        if not only_missing or not (workdir / _NAME).exists():
            write_json(workdir / _NAME, self.to_json())


def read_config(workdir: pathlib.Path) -> Config:
    """Returns the config of a run directory.

    Raises:
      UserError: it holds no run, or that of another version.
    """
    values = _read(workdir, 'config.json')
    try:
        return Config.of(config_lib.completed(values))
    except UserError as error:
        raise UserError(f'{workdir / "config.json"}: {error}; it is of another version') from None


def read_images(workdir: pathlib.Path) -> ImageFacts:
    """Returns the facts of a run's images.

    Raises:
      UserError: it holds no run, or that of a version that did not write them.
    """
    values = _read(workdir, _NAME)
    try:
        info = Info(
            tuple(values['image_shape']),
            tuple(values['classes']),
            *(values[split] for split in ('train', 'validation', 'test')),
        )
        mean, std = (tuple(map(float, values[name])) for name in ('mean', 'std'))
        if not len(mean) == len(std) == info.image_shape[2]:
            raise ValueError('mean and std do not fit the channels')
        return ImageFacts(values['dataset'], info, mean, std)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{workdir / _NAME}: cannot be read ({error}); {_REMEDY}') from None


_REMEDY = 'evaluate the run once with --mode eval, which writes it'


def _read(workdir: pathlib.Path, name: str) -> dict[str, Any]:
    path = workdir / name
    if not workdir.is_dir():
        raise UserError(f'--workdir: there is no directory {workdir}; name that of a run')
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        why = 'holds no run' if name != _NAME or not (workdir / 'config.json').exists() else ''
        missing = f'{path} is missing, as in runs of older versions; {_REMEDY}'
        raise UserError(f'--workdir: {workdir} {why}' if why else missing) from None
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: cannot be read ({error})') from None
    if not isinstance(values, dict):
        raise UserError(f'{path}: cannot be read (it is not an object)')
    return values
