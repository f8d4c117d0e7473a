"""A trained network by itself: loaded from a run directory, without its images or optimizers."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from afkd_jax import paths
from afkd_jax.checkpoints import weights
from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.checkpoints.artefact import ImageFacts
from afkd_jax.command import Command, number_or
from afkd_jax.config import Config
from afkd_jax.data import augment, decode
from afkd_jax.errors import UserError
from afkd_jax.report.console import log, working

_BATCH = 256  # images of one call of the compiled function, at most


class Model:
    """One trained network, or the ensemble of all networks of a run.

    Attributes:
      architectures: names of the networks.
      name: e.g. '1 resnet8' or 'ensemble'.
      classes: names of the classes.
      image_shape: (H, W, C) of the input.
      module: Flax module, (standardised images, train) -> (logits, feature map); of the ensemble a
        tuple of modules.
      variables: of the module, on the first device; of the ensemble a tuple.
      all_variables: a tuple of one, or of all networks'.
      mean: float32 [C], of pixels in 0 .. 1, by which the input is standardised.
      std: likewise.
      step: of the checkpoint.
    """

    def __init__(
        self,
        name: str,
        architectures: Sequence[str],
        config: Config,
        facts: ImageFacts,
        parts: Sequence[Any],
        step: int,
    ):
        self.name, self.architectures = name, tuple(architectures)
        self.config, self.step = config, step
        self.classes, self.image_shape = facts.info.classes, facts.info.image_shape
        self.mean, self.std = np.array(facts.mean, np.float32), np.array(facts.std, np.float32)
        modules, variables = zip(*parts, strict=True)
        single = len(parts) == 1
        self.module: Any = modules[0] if single else modules
        self.variables: Any = variables[0] if single else variables
        self._modules, self.all_variables = modules, variables
        self._predict, self._features = jax.jit(self.probabilities), jax.jit(self._maps)

    def _outputs(self, variables: Any, pixels_BxHxWxC: jax.Array) -> list[Any]:
        unit = augment.unit(pixels_BxHxWxC, jnp.float32)
        images = augment.standardise(unit, jnp.asarray(self.mean), jnp.asarray(self.std))
        return [
            module.apply(own, images, False)
            for module, own in zip(self._modules, variables, strict=True)
        ]

    def probabilities(self, variables: Any, pixels_BxHxWxC: jax.Array) -> jax.Array:
        """Returns class probabilities [B, C] of uint8 images; a pure function, to jit or export."""
        outputs = self._outputs(variables, pixels_BxHxWxC)
        return jnp.stack([jax.nn.softmax(logits) for logits, _ in outputs]).mean(0)

    def _maps(self, variables: Any, pixels_BxHxWxC: jax.Array) -> jax.Array:
        return self._outputs(variables, pixels_BxHxWxC)[0][1]

    def predict(self, images: Any) -> np.ndarray:
        """Returns class probabilities, float32 [B, C]; of the ensemble their mean.

        Args:
          images: uint8 [B, H, W, C], or paths of image files; see read().

        Raises:
          UserError: the images have another dtype or shape, or a file is no image.
        """
        return self._batched(self._predict, images)

    def features(self, images: Any) -> np.ndarray:
        """Returns the last feature maps before pooling, [B, h, w, c]; see predict()."""
        if len(self._modules) > 1:
            raise UserError('features: the ensemble has several feature maps; load one network')
        return self._batched(self._features, images)

    def _batched(self, function: Any, images: Any) -> np.ndarray:
        if isinstance(images, str | pathlib.Path):
            images = [images]
        if not len(images):
            raise UserError('images: none are given')
        results = []
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            if not isinstance(batch, np.ndarray | jax.Array):
                batch = np.stack([self.read(path) for path in batch])
            if batch.dtype != np.uint8 or batch.shape[1:] != self.image_shape:
                shape = ', '.join(map(str, ('B', *self.image_shape)))
                have = f'{batch.dtype} {[len(images), *batch.shape[1:]]}'
                raise UserError(f'images: must be uint8 [{shape}], but are {have}')
            # Powers of two, so that few shapes are compiled.
            size = min(_BATCH, 1 << (len(batch) - 1).bit_length())
            padding = np.repeat(np.asarray(batch[:1]), size - len(batch), 0)
            result = function(self.all_variables, np.concatenate([batch, padding]))
            results.append(np.asarray(result, np.float32)[: len(batch)])
        return np.concatenate(results)

    def read(self, path: str | pathlib.Path) -> np.ndarray:
        """Returns an image file as the network sees it in evaluation, uint8 [H, W, C].

        As the run's config resizes and crops; an image of another size is scaled and cropped to the
        centre. Colours become grey, or grey colours, as the network needs.

        Raises:
          UserError: the file cannot be read or decoded.
        """
        height, width, channels = self.image_shape
        try:
            content = pathlib.Path(path).read_bytes()
            pixels = decode.View(self.config.data).evaluation(content, channels)
        except (OSError, decode.DecodeError) as error:
            reason = getattr(error, 'strerror', None) or error
            raise UserError(f'{path}: cannot be read as an image ({reason})') from None
        if pixels.shape == self.image_shape:
            return pixels
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        fitted = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR))
        return fitted.reshape(self.image_shape)


def load(workdir: str | pathlib.Path, network: int | str = 1, step: int | str = 'last') -> Model:
    """Returns a trained network of a run directory, on the first device.

    Reads neither the training images nor the other networks, and works for every placement, dtype
    and mesh that wrote the run.

    Args:
      workdir: of the run.
      network: counted from 1, or 'ensemble': the mean of all networks' probabilities.
      step: of the checkpoint: 'last', 'best' (of this network on validation) or a number.

    Raises:
      UserError: there is no such run, network or checkpoint, or it is damaged.
    """
    numbers = isinstance(network, int | np.integer) and not isinstance(network, bool)
    if network != 'ensemble' and not numbers:
        raise UserError(f"network: must be a number or 'ensemble', but is {network!r}")
    numbered = None if network == 'ensemble' else [int(network)]
    trained = weights.read_run(paths.directory('workdir', workdir), numbered, step)
    for line in trained.warnings():
        log(line)
    cohort = trained.cohort
    wanted = [number - 1 for number in numbered or range(1, len(cohort.names) + 1)]
    parts = [(cohort.networks[k], own) for k, own in zip(wanted, trained.variables, strict=True)]
    names = [cohort.names[k] for k in wanted]
    name = f'{network} {names[0]}' if numbered else 'ensemble'
    return Model(name, names, trained.config, trained.images, parts, trained.step)


def load_for(command: Command) -> Model:
    """Returns the network that --network and --step name, of the run in --workdir.

    Raises:
      UserError: see load; or the flags are malformed, or the config is not that of the run.
    """
    options = command.options
    network = number_or(options.network, 'network', 1, 'ensemble')
    step = number_or(options.step, 'step', 0, 'last', 'best')
    workdir_lib.check(command.workdir, command.config)
    with working('loading the network'):
        return load(
            command.workdir,
            1 if network is None else network,
            'last' if step is None else step,
        )
