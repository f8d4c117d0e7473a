"""The cohort: the static half of a run (modules, method, optimizers); holds no arrays."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax

from afkd_jax import models
from afkd_jax.config import Config, steps_in
from afkd_jax.errors import UserError, field_error
from afkd_jax.method import optim, presets
from afkd_jax.method.adversary import Discriminator, StageTransfer, Transfer
from afkd_jax.method.objective import Objective
from afkd_jax.method.ring import Ring
from afkd_jax.models import layers

Shape = tuple[int, int, int]  # (h, w, c)


@dataclasses.dataclass(frozen=True)
class Cohort:
    """K networks that are trained together; a pure function of config and data set.

    Attributes:
      transfers: K; None where the map fits as it is, or no maps are compared.
      discriminators: K, None of a frozen network; () if the method has none.
      auxiliary: the module that the logit loss needs besides the networks; None if none.
      frozen: the networks that never change and only teach, counted from 0.
      stage_shapes: K, of the maps that are compared, before the transfer layers; else of the
        feature map. The last is the feature map.
      shared_shapes: the same, after the transfer layers; () if no maps are compared.
      ema_decay: of the averages of the networks; 0 if there are none.
      ema_teaches: whether teachers are the averages.
      local_statistics: whether batch statistics are over each device's shard of the batch.
    """

    names: tuple[str, ...]
    networks: tuple[models.Network, ...]
    transfers: tuple[Transfer | StageTransfer | None, ...]
    discriminators: tuple[Discriminator | None, ...]
    auxiliary: nn.Module | None
    frozen: tuple[int, ...]
    optimizers: optim.Optimizers
    objective: Objective
    stage_shapes: tuple[tuple[Shape, ...], ...]
    shared_shapes: tuple[Shape, ...]
    image_shape: Shape
    num_classes: int
    ema_decay: float
    ema_teaches: bool
    local_statistics: bool

    @property
    def method(self) -> presets.Method:
        """What logits and maps learn from."""
        return self.objective.method

    @property
    def stages(self) -> int:
        """How many maps of a network are compared; above 1 they are a tuple."""
        return len(self.shared_shapes) or 1

    @property
    def map_shapes(self) -> tuple[Shape, ...]:
        """K, of the feature maps, before the transfer layers."""
        return tuple(shapes[-1] for shapes in self.stage_shapes)

    @property
    def shared_map(self) -> Shape | None:
        """The shape of the feature maps after the transfer layers; None if none are compared."""
        return self.shared_shapes[-1] if self.shared_shapes else None

    @property
    def ring(self) -> Ring:
        """Which network teaches which."""
        return self.objective.ring

    @property
    def local(self) -> 'Cohort':
        """The first K / peers networks: what one device has where they are sharded."""
        count = len(self.names) // self.ring.peers
        parts = ('names', 'networks', 'transfers', 'discriminators', 'stage_shapes')
        return dataclasses.replace(self, **{part: getattr(self, part)[:count] for part in parts})

    def learns(self, network: int) -> bool:
        """Returns whether the network, counted from 0, is trained."""
        return network not in self.frozen

    def updated_parts(self) -> dict[str, tuple[str, ...]]:
        """Returns the optimizers of a network -> the parts of its parameters that each updates.

        A frozen network has no optimizers.
        """
        if self.optimizers.feature:
            return {'logit': ('trunk', 'head'), 'feature': ('trunk', 'transfer')}
        if self.method.uses_maps:
            return {'logit': ('trunk', 'head', 'transfer')}
        return {'logit': ('trunk', 'head')}


@functools.lru_cache(maxsize=64)
def _stage_shapes(network: Any, image_shape: Shape) -> tuple[Shape, ...]:
    """Returns the shapes of the maps of a network's trunk; touches no device."""
    image = jax.ShapeDtypeStruct((1, *image_shape), 'float32')
    key = jax.eval_shape(lambda: jax.random.key(0))
    maps, _ = jax.eval_shape(lambda k, x: network.trunk.init_with_output(k, x, False), key, image)
    stages = maps if isinstance(maps, tuple) else (maps,)
    if not stages or any(len(getattr(each, 'shape', ())) != 4 for each in stages):
        raise UserError(
            f'config.networks: {type(network.trunk).__name__} must return one feature map '
            '[B, h, w, c], or a tuple of the maps of its stages, but returns '
            f'{jax.tree.map(lambda leaf: leaf.shape, maps)}'
        )
    return tuple(each.shape[1:] for each in stages)


def method_of(config: Config) -> presets.Method:
    """Returns the method.

    Raises:
      UserError: there is none of this name, or the networks are too few for it, or sharded or
        frozen where it cannot use them.
    """
    method = presets.named(config.method)
    if config.mesh.peer > 1 and method.hops(len(config.networks)) is None:
        rule = f'1 with the logit teacher "{method.logits}", which needs the logits of all networks'
        raise field_error('mesh.peer', rule, config.mesh.peer)
    if config.teacher == 'ema':
        if not config.ema.decay:
            raise field_error('ema.decay', "above 0 where config.teacher is 'ema'", 0.0)
        if not method.averages_can_teach:
            rule = f'\'live\' with the method "{config.method}", whose teachers are no averages'
            raise field_error('teacher', rule, config.teacher)
    if config.stages > 1 and method.auxiliary:
        raise field_error('stages', f'1 with the method "{method.logits}"', config.stages)
    if config.stages > 1 and method.adversarial and config.adversarial.balance != 'none':
        rule = '1 with adversarial.balance, which compares gradients at one map'
        raise field_error('stages', rule, config.stages)
    if method.switches and len(config.networks) != 2:
        rule = f'two, teacher and student, with the method "{method.logits}"'
        raise field_error('networks', rule, config.networks)
    if method.auxiliary:
        least, names = method.auxiliary.least, config.networks
        if len(names) < least:
            rule = f'at least {least} with the method "{method.logits}"'
            raise field_error('networks', rule, names)
        if config.frozen:
            rule = f'() with the method "{method.logits}", which updates all networks at once'
            raise field_error('frozen', rule, config.frozen)
    return method


def ring_of(config: Config, peers: int = 1) -> Ring:
    """Returns the ring of config.ring_order, which counts networks from 1; () is as listed.

    Raises:
      UserError: it does not name each network once, or the networks cannot be sharded in it.
    """
    order, listed = config.ring_order, tuple(range(1, len(config.networks) + 1))
    if order and sorted(order) != list(listed):
        raise UserError(
            f'config.ring_order: must name each of the networks 1 .. {len(listed)} once, as in '
            f'{(*listed[1:], 1)}, or be () for the order of config.networks, but is {order}'
        )
    if peers > 1 and (order or listed) != listed:
        raise UserError(
            f'{field_error("ring_order", "() where config.mesh.peer is above 1", order)}: networks '
            'of one architecture differ only in their seeds'
        )
    return Ring(tuple(network - 1 for network in order or listed), peers)


def frozen_of(config: Config) -> tuple[int, ...]:
    """Returns the networks of config.frozen, counted from 0.

    Raises:
      UserError: there is no such network or none that learns; one has no weights, or is sharded.
    """
    count, frozen, sources = len(config.networks), config.frozen, config.init_from
    if len(sources) not in (0, count):
        raise field_error('init_from', f'one string per network, that is {count}, or ()', sources)
    if frozen and not 1 <= frozen[0] <= frozen[-1] <= count:
        raise field_error('frozen', f'numbers of networks, in 1 .. {count}', frozen)
    if len(frozen) == count:
        raise field_error('frozen', 'some of the networks: one at least must learn', frozen)
    for network in frozen:
        if not sources or not sources[network - 1]:
            raise UserError(
                f'config.frozen: network {network} ({config.networks[network - 1]}) is frozen and '
                'needs trained weights; name them in config.init_from'
            )
    if frozen and config.mesh.peer > 1:
        raise field_error('mesh.peer', '1 with a frozen network', config.mesh.peer)
    return tuple(network - 1 for network in frozen)


def _shared(shapes: dict[str, Shape], names: tuple[str, ...], frozen: tuple[int, ...]) -> Shape:
    """Returns the shape to which all maps of a stage are brought."""
    heights, widths, channels = zip(*shapes.values(), strict=True)
    # A frozen network's map is used as it is: no transfer layer is trained for it.
    teachers = {names[k]: shapes[names[k]][2] for k in frozen}
    if len(set(teachers.values())) > 1:
        raise UserError(
            'config.frozen: with a method that compares maps, the maps of all frozen networks '
            f'must have equally many channels, but have {teachers}'
        )
    return min(heights), min(widths), max(teachers.values() or channels)


def _transfer(
    shapes: tuple[Shape, ...], shared: tuple[Shape, ...], parts: layers.Layers
) -> Transfer | StageTransfer | None:
    """Returns the transfer layers of a network; None if all of its maps fit."""
    found = tuple(
        None if own == target else Transfer(target, parts)
        for own, target in zip(shapes, shared, strict=True)
    )
    if not any(found):
        return None
    return found[0] if len(found) == 1 else StageTransfer(found)


def assemble(
    config: Config,
    image_shape: Shape,
    num_classes: int,
    train_examples: int,
    axis_name: str | None = None,
    peers: int = 1,
) -> Cohort:
    """Returns the cohort of a config.

    Args:
      config: checked.
      image_shape: (H, W, C).
      train_examples: images in one epoch; schedules are fractions of the run's epochs.
      axis_name: the mesh axis over which the batch is sharded; None where nothing is mapped.
      peers: devices over which the networks are sharded.

    Raises:
      UserError: an unknown method or network, a wrong ring, or images too small for a network;
        see also frozen_of.
    """
    method, ring, names = method_of(config), ring_of(config, peers), config.networks
    frozen = frozen_of(config)
    local = config.batch_statistics == 'local'
    parts = layers.layers(axis_name, dtype=config.dtype, local_statistics=local)
    # One module serves all networks of one name: modules hold no parameters.
    stages = config.stages if method.uses_maps else 1
    modules = {name: models.build(name, num_classes, image_shape, parts, stages) for name in names}
    stage_shapes = {}
    for name, module in modules.items():
        found = _stage_shapes(module, image_shape)  # pyright: ignore - modules hash by fields
        if len(found) < stages:
            rule = f'at most {len(found)}, the stages of which "{name}" returns maps'
            raise field_error('stages', rule, stages)
        stage_shapes[name] = found[-stages:]
    shapes = {name: found[-1] for name, found in stage_shapes.items()}
    # Our choice: D_k needs more than a single point.
    least = 2 if method.adversarial and config.discriminator.input != 'pooled' else 1
    for name, (height, width, _) in shapes.items():
        if min(height, width) < least:
            why = ', too small for a discriminator' if least > 1 and min(height, width) else ''
            raise UserError(
                f'config.networks: images of {image_shape[0]}x{image_shape[1]} are too small for '
                f'"{name}": its feature map would be {height}x{width}{why}; at least '
                f'{least}x{least} is needed: choose larger images or another network'
            )
    shared = ()
    if method.uses_maps:
        shared = tuple(
            _shared({name: found[stage] for name, found in stage_shapes.items()}, names, frozen)
            for stage in range(stages)
        )

    def run_steps(fraction: float) -> int:
        return steps_in(fraction * config.epochs, train_examples, config.batch_size)

    transfers = {
        name: _transfer(found, shared, parts) if shared else None
        for name, found in stage_shapes.items()
    }
    conditioned = 0 if config.discriminator.condition == 'none' else num_classes
    adversarial = config.adversarial
    return Cohort(
        names=names,
        networks=tuple(modules[name] for name in names),
        transfers=tuple(transfers[name] for name in names),
        discriminators=tuple(
            None if k in frozen else Discriminator(parts, config.discriminator, conditioned)
            for k in range(len(names) if method.adversarial else 0)
        ),
        auxiliary=method.auxiliary and method.auxiliary.module(parts, len(names), num_classes),
        frozen=frozen,
        optimizers=optim.create(config, method.adversarial, run_steps),
        objective=Objective(
            method,
            ring,
            config.loss,
            run_steps(config.loss.kl_ramp_up),
            frozen,
            config.discriminator,
            adversarial,
            run_steps(adversarial.warm_up),
        ),
        stage_shapes=tuple(stage_shapes[name] for name in names),
        shared_shapes=shared,
        image_shape=image_shape,
        num_classes=num_classes,
        ema_decay=config.ema.decay,
        ema_teaches=config.teacher == 'ema',
        local_statistics=local,
    )
