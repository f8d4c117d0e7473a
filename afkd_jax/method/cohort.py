"""The static half of a run: networks, transfers, discriminators, method and optimizers; no arrays.

A cohort is a pure function of the config and of the images' shape. It is what the step closes
over, and what `describe` prints.
"""

import dataclasses
import functools

import jax
from ml_collections import ConfigDict

from afkd_jax import config as config_lib
from afkd_jax import models
from afkd_jax.errors import UserError
from afkd_jax.method import optim
from afkd_jax.method import presets as methods
from afkd_jax.method.adversary import Discriminator, Transfer
from afkd_jax.method.objective import Objective
from afkd_jax.method.ring import Ring
from afkd_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Cohort:
    """K networks that are trained together.

    Attributes:
      names: of the networks, as listed in the config.
      networks: K modules, each image -> (logits, feature map).
      transfers: K modules, None where the map fits as it is; () if the maps teach nothing.
      discriminators: K modules; () if the method has none.
      optimizers: the rules of update.
      objective: what is learnt, from whom.
      map_shapes: K shapes (h, w, c) of the networks' own maps.
      shared_map: the shape (h, w, c) after the transfers; None if the maps teach nothing.
      image_shape: (H, W, C).
      local_statistics: whether batch statistics are of each device's share of the batch.
    """

    names: tuple[str, ...]
    networks: tuple[models.Network, ...]
    transfers: tuple[Transfer | None, ...]
    discriminators: tuple[Discriminator, ...]
    optimizers: optim.Optimizers
    objective: Objective
    map_shapes: tuple[tuple[int, int, int], ...]
    shared_map: tuple[int, int, int] | None
    image_shape: tuple[int, int, int]
    local_statistics: bool

    @property
    def adversarial(self) -> bool:
        """Whether there are discriminators, and hence feature and discriminator updates."""
        return self.objective.method.maps == 'adversarial'

    @property
    def maps_teach(self) -> bool:
        """Whether maps are compared, and hence brought to one shape."""
        return self.objective.method.maps != 'nothing'

    @property
    def here(self) -> 'Cohort':
        """The networks that one device has, where they are spread: as many as it has, of K."""
        count = len(self.names) // self.objective.ring.peers
        parts = ('names', 'networks', 'transfers', 'discriminators', 'map_shapes')
        return dataclasses.replace(self, **{part: getattr(self, part)[:count] for part in parts})

    def moves(self) -> dict[str, tuple[str, ...]]:
        """Returns which parts of a network's parameters each of its optimizers moves."""
        if self.adversarial:
            return {'logit': ('trunk', 'head'), 'feature': ('trunk', 'transfer')}
        return {'logit': ('trunk', 'head', 'transfer') if self.maps_teach else ('trunk', 'head')}


@functools.lru_cache(maxsize=64)
def _map_shape(network: models.Network, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns (h, w, c) of a network's map; no device is touched."""
    image = jax.ShapeDtypeStruct((1, *image_shape), 'float32')
    key = jax.eval_shape(lambda: jax.random.key(0))
    maps, _ = jax.eval_shape(lambda k, x: network.trunk.init_with_output(k, x, False), key, image)
    return maps.shape[1:]


def _check_size(
    name: str, shape: tuple[int, int, int], image_shape: tuple[int, int, int], least: int
) -> None:
    if min(shape[:2]) < least:
        why = ', too small for a discriminator' if least > 1 and min(shape[:2]) else ''
        raise UserError(
            f'config.networks: images of {image_shape[0]}x{image_shape[1]} are too small for '
            f'"{name}": its feature map would be {shape[0]}x{shape[1]}{why}; at least '
            f'{least}x{least} is needed: choose larger images or another network'
        )


def ring_of(config: ConfigDict) -> Ring:
    """Returns the ring of config.ring_order, which counts networks from 1; () is as listed.

    Raises:
      UserError: it does not name each network once.
    """
    order, listed = tuple(config.ring_order), tuple(range(1, len(config.networks) + 1))
    if order and sorted(order) != list(listed):
        raise UserError(
            f'config.ring_order: must name each of the networks 1 .. {len(listed)} once, as in '
            f'{(*listed[1:], 1)}, or be () for the order of config.networks, but is {order}'
        )
    return Ring(tuple(network - 1 for network in order or listed))


def assemble(
    config: ConfigDict,
    image_shape: tuple[int, int, int],
    num_classes: int,
    train_examples: int,
    axis_name: str | None = None,
    peers: int = 1,
) -> Cohort:
    """Returns the cohort of a config.

    Args:
      config: valid (config.validate).
      image_shape: (H, W, C).
      num_classes: of the data set.
      train_examples: images in one epoch; schedules are fractions of the run's epochs.
      axis_name: the mapped axis over which the batch is split, None where nothing is mapped.
      peers: over how many devices the networks are spread.

    Raises:
      UserError: an unknown method or network, a wrong ring, images too small for a network, or an
        order of the ring in which it cannot be spread.
    """
    method, names = methods.named(config.method), tuple(config.networks)
    # One module serves all networks of one name: modules hold no parameters.
    local = config.batch_statistics == 'local'
    parts = layers.layers(axis_name, dtype=config.dtype, local_statistics=local)
    modules = {name: models.build(name, num_classes, image_shape, parts) for name in names}
    shapes = {name: _map_shape(module, image_shape) for name, module in modules.items()}
    adversarial = method.maps == 'adversarial'
    for name, shape in shapes.items():
        # Our choice: where the map is a single point a discriminator would see no map at all.
        _check_size(name, shape, image_shape, least=2 if adversarial else 1)
    shared, transfers = None, ()
    if method.maps != 'nothing':
        heights, widths, channels = zip(*shapes.values(), strict=True)
        shared = (min(heights), min(widths), max(channels))
        transfers = tuple(
            None if shapes[name] == shared else Transfer(shared, parts.conv, parts.norm)
            for name in names
        )

    ring = dataclasses.replace(ring_of(config), peers=peers)
    if peers > 1 and ring.order != tuple(range(len(names))):
        raise UserError(
            f'config.ring_order: must be () where config.mesh.peer is above 1, but is '
            f'{tuple(config.ring_order)}: networks of one architecture differ in their seeds alone'
        )

    def steps_in(fraction):
        return config_lib.steps_in(fraction * config.epochs, train_examples, config.batch_size)

    return Cohort(
        names=names,
        networks=tuple(modules[name] for name in names),
        transfers=transfers,
        discriminators=tuple(Discriminator(parts) for _ in names if adversarial),
        optimizers=optim.create(config, adversarial, steps_in),
        objective=Objective(
            method=method,
            ring=ring,
            temperature=config.loss.temperature,
            label_smoothing=config.loss.label_smoothing,
            kl_weight=config.loss.kl_weight,
            kl_ramp_steps=steps_in(config.loss.kl_ramp_up),
            l1_weight=config.loss.l1_weight,
            adversarial_weight=config.loss.adversarial_weight,
        ),
        map_shapes=tuple(shapes[name] for name in names),
        shared_map=shared,
        image_shape=image_shape,
        local_statistics=local,
    )
