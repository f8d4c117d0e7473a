"""The static half of a run: networks, transfers, discriminators, method and optimizers; no arrays.

A cohort is a pure function of the config and of the images' shape. It is what the step closes
over, and what `describe` prints.
"""

import dataclasses

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from afkd_jax import config as config_lib
from afkd_jax import methods, models, optim
from afkd_jax.adversary import Discriminator, Transfer
from afkd_jax.errors import UserError
from afkd_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Cohort:
    """K networks that are trained together.

    Attributes:
      names: of the networks, in the ring's order.
      networks: K modules, each image -> (logits, feature map).
      transfers: K modules, None where the map fits as it is; () if the maps teach nothing.
      discriminators: K modules; () if the method has none.
      optimizers: the rules of update.
      method: whom logits and maps learn from.
      temperature: T of the mimicry KL.
      map_shapes: K shapes (h, w, c) of the networks' own maps.
      shared_map: the shape (h, w, c) after the transfers.
      image_shape: (H, W, C).
    """

    names: tuple[str, ...]
    networks: tuple[models.Network, ...]
    transfers: tuple[Transfer | None, ...]
    discriminators: tuple[Discriminator, ...]
    optimizers: optim.Optimizers
    method: methods.Method
    temperature: float
    map_shapes: tuple[tuple[int, int, int], ...]
    shared_map: tuple[int, int, int]
    image_shape: tuple[int, int, int]

    @property
    def adversarial(self) -> bool:
        """Whether there are discriminators, and hence feature and discriminator updates."""
        return self.method.maps == 'adversarial'


def _map_shape(
    name: str, network: nn.Module, image_shape: tuple[int, ...], least: int
) -> tuple[int, ...]:
    """Returns (h, w, c) of the network's map, h and w at least `least`; no device is touched."""
    image = jax.ShapeDtypeStruct((1, *image_shape), 'float32')
    key = jax.eval_shape(lambda: jax.random.key(0))
    (_, maps), _ = jax.eval_shape(lambda k, x: network.init_with_output(k, x, False), key, image)
    height, width, channels = maps.shape[1:]
    if min(height, width) < least:
        raise UserError(
            f'config.networks: images of {image_shape[0]}x{image_shape[1]} are too small for '
            f'"{name}": its feature map would be {height}x{width}, but must be at least '
            f'{least}x{least}; choose larger images or another network'
        )
    return height, width, channels


def assemble(
    config: ConfigDict,
    image_shape: tuple[int, int, int],
    num_classes: int,
    train_examples: int,
    axis_name: str | None = None,
) -> Cohort:
    """Returns the cohort of a config.

    Args:
      config: valid (config.validate).
      image_shape: (H, W, C).
      num_classes: of the data set.
      train_examples: images in one epoch; schedules are in epochs.
      axis_name: the mapped axis over which batch statistics are taken.

    Raises:
      UserError: an unknown method or network, or images too small for a network.
    """
    method = methods.named(config.method)
    names = tuple(config.networks)
    networks = tuple(models.build(name, num_classes, axis_name) for name in names)
    adversarial = method.maps == 'adversarial'
    # Our choice: where the map is a single point the discriminator would see no map at all.
    least = 2 if adversarial else 1
    shapes = tuple(
        _map_shape(name, network, image_shape, least)
        for name, network in zip(names, networks, strict=True)
    )
    shared = (*shapes[0][:2], max(shape[2] for shape in shapes))
    norm = layers.batch_norm(axis_name)
    return Cohort(
        names=names,
        networks=networks,
        transfers=tuple(
            None if shape == shared else Transfer(shared[2], layers.conv, norm)
            for shape in shapes
            if adversarial
        ),
        discriminators=tuple(Discriminator(norm) for _ in names if adversarial),
        optimizers=optim.create(
            config,
            adversarial,
            lambda epochs: config_lib.steps_in(
                config.epochs if epochs is None else epochs, train_examples, config.batch_size
            ),
        ),
        method=method,
        temperature=config.temperature,
        map_shapes=shapes,
        shared_map=shared,
        image_shape=image_shape,
    )
