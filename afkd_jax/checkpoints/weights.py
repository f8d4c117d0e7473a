"""Trained weights: of a run's checkpoint, or in a safetensors file.

A safetensors file has parameters and batch statistics under their Flax names ('trunk/conv/kernel',
..., 'batch_stats/trunk/norm/mean', ...), and its metadata describe the network, each value as JSON.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from afkd_jax import paths
from afkd_jax.checkpoints import artefact, partial
from afkd_jax.checkpoints.artefact import ImageFacts
from afkd_jax.checkpoints.store import step_of
from afkd_jax.config import SAFETENSORS, Config
from afkd_jax.errors import UserError, first_line
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.method import state as state_lib
from afkd_jax.method.cohort import Cohort


@dataclasses.dataclass(frozen=True)
class Trained:
    """Networks of a run's checkpoint.

    Attributes:
      variables: params and batch_stats of each network that was asked for.
      step: of the checkpoint.
      rejected: newer checkpoints -> why they are unusable.
    """

    config: Config
    images: ImageFacts
    cohort: Cohort
    variables: list[dict[str, Any]]
    step: int
    rejected: dict[pathlib.Path, str]

    def warnings(self) -> list[str]:
        """Returns a line about each newer checkpoint that is not used."""
        return [
            f'warning: {path}: this checkpoint {why}; that of step {self.step} is used'
            for path, why in self.rejected.items()
        ]


def read_run(workdir: pathlib.Path, networks: Sequence[int] | None, step: int | str) -> Trained:
    """Returns networks of a run directory; reads neither its training images nor its optimizers.

    Args:
      workdir: of the run.
      networks: counted from 1; None for all.
      step: of the checkpoint: 'last', 'best' (on validation, of the one network, or of the
        ensemble) or a number.

    Raises:
      UserError: there is no such run, network or checkpoint, or it is damaged.
    """
    config, images = artefact.read_config(workdir), artefact.read_images(workdir)
    count = len(config.networks)
    wanted = [number - 1 for number in networks or range(1, count + 1)]
    for k in wanted:
        if not 0 <= k < count:
            raise UserError(f"network: must be in 1 .. {count}, or 'ensemble', but is {k + 1}")
    info = images.info
    cohort = cohort_lib.assemble(config, info.image_shape, info.num_classes, info.train)
    path, rejected = partial.find(workdir, config, step, wanted[0] if networks else None)
    variables = partial.read_variables(path, state_lib.abstract(cohort), wanted)
    return Trained(config, images, cohort, variables, step_of(path), rejected)


def to_tensors(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the variables of a network by the names that they have in a safetensors file."""
    tree = {**variables['params'], 'batch_stats': variables['batch_stats']}
    flat = traverse_util.flatten_dict(tree, sep='/')
    return {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}


def _from_tensors(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    params = traverse_util.unflatten_dict(tensors, sep='/')
    stats = params.pop('batch_stats', {})
    return {'params': params, 'batch_stats': stats}


@dataclasses.dataclass(frozen=True)
class Weights:
    """A trained network to start from.

    Attributes:
      architecture: its name in config.networks.
      step: of the checkpoint.
      variables: params and batch_stats.
      mean: per channel, of pixels in 0 .. 1, by which its images were standardised.
      std: likewise.
      warnings: lines about newer checkpoints that are not used.
    """

    source: str
    architecture: str
    step: int
    variables: dict[str, Any]
    classes: tuple[str, ...]
    image_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    warnings: Sequence[str] = ()


def _split(source: str) -> tuple[pathlib.Path, int]:
    """Returns the run directory and the number of the network of 'RUN:NUMBER'."""
    match = re.fullmatch(r'(.+):(\d{1,9})', source)
    if not match:
        raise UserError(
            "config.init_from: must name a network of a run, as in 'runs/a:1', or an exported "
            f'file, as in net{SAFETENSORS}, but is {source!r}'
        )
    return paths.directory('config.init_from', match[1]), int(match[2])


def architecture_of(source: str) -> str:
    """Returns the architecture of the weights that are named, without reading them.

    Raises:
      UserError: there are none.
    """
    if source.endswith(SAFETENSORS):
        return _described(source)['architecture'][0]
    workdir, number = _split(source)
    names = artefact.read_config(workdir).networks
    if not 1 <= number <= len(names):
        raise UserError(f'{source}: {workdir} has the networks 1 .. {len(names)}')
    return names[number - 1]


def _described(source: str) -> dict[str, Any]:
    """Returns the description in a safetensors file."""

    def facts(file: Any) -> dict[str, Any]:
        found = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        match found.get('architecture'):
            case [str()]:
                return found
        raise ValueError('it has no description of a network')

    return _open(source, facts)


def _open(source: str, read: Callable[[Any], Any]) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f'{source}: needs a package: python -m pip install safetensors') from None
    try:
        with safe_open(paths.directory('config.init_from', source), framework='numpy') as file:
            return read(file)
    except (OSError, SafetensorError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(
            f'{source}: cannot be read as an exported network ({first_line(error)})'
        ) from None


def _tensors(file: Any) -> dict[str, np.ndarray]:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def read(source: str) -> Weights:
    """Returns the weights that an entry of config.init_from names.

    Raises:
      UserError: they cannot be read.
    """
    if source.endswith(SAFETENSORS):
        facts = _described(source)
        tensors = _open(source, _tensors)
        try:
            return Weights(
                source,
                facts['architecture'][0],
                facts['step'],
                _from_tensors(tensors),
                *(tuple(facts[name]) for name in ('classes', 'image_shape', 'mean', 'std')),
            )
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f'{source}: has no valid description of its network ({error})'
            ) from None
    architecture, (workdir, number) = architecture_of(source), _split(source)
    trained = read_run(workdir, [number], 'last')
    info = trained.images.info
    return Weights(
        source,
        architecture,
        trained.step,
        jax.device_get(trained.variables[0]),
        info.classes,
        info.image_shape,
        trained.images.mean,
        trained.images.std,
        trained.warnings(),
    )
