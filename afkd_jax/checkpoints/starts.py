"""Where networks start: trained weights of config.init_from, also of those that are frozen."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from afkd_jax import config as config_lib
from afkd_jax.checkpoints import artefact
from afkd_jax.checkpoints import weights as weights_lib
from afkd_jax.checkpoints.artefact import ImageFacts
from afkd_jax.checkpoints.weights import Weights
from afkd_jax.config import Config
from afkd_jax.errors import UserError
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.method import state as state_lib
from afkd_jax.method.cohort import Cohort


def resolved(config: Config, workdir: pathlib.Path) -> Config:
    """Returns the config with each entry of config.networks that names weights resolved.

    That is, to the name of its architecture, with init_from and frozen set. A run that has begun
    knows the architectures of its networks: what they started from may be gone, or another by now.

    Raises:
      UserError: the run or file cannot be read.
    """
    if not any(map(config_lib.names_weights, config.networks)):
        return config
    names = list(config.networks)
    sources = list(config.init_from or ('',) * len(names))
    if len(sources) != len(names):
        cohort_lib.frozen_of(config)  # raises
    frozen, known = set(config.frozen), _known(workdir)
    for k, name in enumerate(names):
        if not config_lib.names_weights(name):
            continue
        if sources[k] not in ('', name):
            raise UserError(
                f'config.init_from: network {k + 1} is the frozen network {name} and cannot start '
                f'from {sources[k]}'
            )
        sources[k] = name
        frozen.add(k + 1)
        names[k] = known.get(name) or weights_lib.architecture_of(name)
    return config.replace(networks=names, init_from=sources, frozen=sorted(frozen))


def _known(workdir: pathlib.Path) -> dict[str, str]:
    """Returns the weights that the networks of a run started from -> their architectures."""
    try:
        config = artefact.read_config(workdir)
    except UserError:  # there is no run yet; what is wrong with one that is there is found later
        return {}
    return dict(zip(config.init_from, config.networks, strict=False))


def read(
    cohort: Cohort, config: Config, images: ImageFacts, log: Callable[[str], None]
) -> dict[int, dict[str, Any]]:
    """Returns network, counted from 0 -> the variables that it starts from, of config.init_from.

    Of a network that learns, the classifier is left out where the classes are others.

    Args:
      cohort: of all networks.
      config: of the run.
      images: of the run.
      log: takes a line about each, and warnings.

    Raises:
      UserError: weights cannot be read, are of another architecture, or a frozen network was
        trained on other classes, images of another shape, or otherwise standardised ones.
    """
    abstract, found = state_lib.abstract(cohort), {}
    for k, source in enumerate(config.init_from):
        if not source:
            continue
        weights = weights_lib.read(source)
        variables = {**weights.variables, 'params': dict(weights.variables['params'])}
        for line in weights.warnings:
            log(line)
        line = f'network {k + 1} ({cohort.names[k]}) starts from {source}, step {weights.step}'
        if not cohort.learns(k):
            _check_frozen(weights, images)
            line += ', frozen'
        elif weights.classes != images.info.classes:
            del variables['params']['head']
            line += ', with a new classifier: the classes are others'
        expected = abstract.networks[k].variables()
        params = expected['params'].items()
        expected['params'] = {part: own for part, own in params if part in variables['params']}
        _check_arrays(weights, cohort.names[k], expected, variables)
        variables = jax.tree.map(lambda own, like: np.asarray(own, like.dtype), variables, expected)
        log(line)
        found[k] = variables
    return found


def _check_arrays(
    weights: Weights, name: str, expected: dict[str, Any], variables: dict[str, Any]
) -> None:
    wanted: dict[str, Any] = traverse_util.flatten_dict(expected, sep='/')
    found: dict[str, Any] = traverse_util.flatten_dict(variables, sep='/')
    ours, theirs = ({key: tuple(leaf.shape) for key, leaf in a.items()} for a in (wanted, found))
    if ours != theirs:
        where = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
        raise UserError(
            f'config.init_from: {weights.source} is a {weights.architecture} and does not fit '
            f'"{name}": {where} is {theirs.get(where, "missing")}, not {ours.get(where, "there")}'
        )
    for key, leaf in found.items():
        if not (jnp.issubdtype(leaf.dtype, jnp.floating) and np.isfinite(leaf).all()):
            raise UserError(
                f'config.init_from: {weights.source}: {key} holds {leaf.dtype} values that are no '
                'finite floating-point numbers; export it again'
            )


def _check_frozen(weights: Weights, images: ImageFacts) -> None:
    """Rejects a frozen network that would not see the images, or mean the labels, as trained."""
    info = images.info
    for what, theirs, ours in (
        ('classes', weights.classes, info.classes),
        ('image shape', weights.image_shape, info.image_shape),
    ):
        if tuple(theirs) != tuple(ours):
            raise UserError(
                f'config.frozen: {weights.source} was trained with the {what} {_short(theirs)}, '
                f'but the images of this run have {_short(ours)}'
            )
    mean, std = (np.array(values) for values in (weights.mean, weights.std))
    if not (np.allclose(mean, images.mean, 0, 1e-4) and np.allclose(std, images.std, 0, 1e-4)):
        raise UserError(
            f'config.frozen: {weights.source} was trained on images standardised by another mean '
            f'and standard deviation; set config.data.mean={weights.mean} and '
            f'config.data.std={weights.std}'
        )


def _short(values: Sequence[Any]) -> str:
    words = ', '.join(map(str, values[:4]))
    return f'{len(values)}: {words}, ...' if len(values) > 4 else words
