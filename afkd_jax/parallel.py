"""Devices: the mesh, where arrays live, and the one function that maps a step over devices."""

import dataclasses
import platform
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from afkd_jax.errors import UserError

AXIS = 'data'


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run and how a per-device function is mapped over them.

    Attributes:
      mesh: all devices on one axis, AXIS; the batch is split over it, the state is not.
      mapping: 'shard_map' (under jit) or 'pmap'. They map the very same function.
    """

    mesh: Mesh
    mapping: str

    @classmethod
    def local(cls, mapping: str, count: int | None = None) -> 'Devices':
        """Returns the first `count` local devices, all of them by default.

        Raises:
          UserError: JAX finds no device of the platform that it is told to use.
        """
        try:
            devices = jax.local_devices()[:count]
        except RuntimeError as error:
            words = ' '.join(str(error).split())
            raise UserError(
                f'JAX_PLATFORMS: JAX cannot use what it asks for ({words}); unset it, or install '
                'JAX for those devices (see README)'
            ) from error
        return cls(Mesh(np.array(devices), (AXIS,)), mapping)

    @property
    def name(self) -> str:
        """How many devices of which kind, e.g. '2 x TPU v5e' or '1 x cpu (x86_64)'."""
        kind = self.mesh.devices[0].device_kind
        detail = f' ({platform.machine()})' if kind == 'cpu' else ''
        return f'{self.mesh.size} x {kind}{detail}'

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def check_divides(self, field: str, batch_size: int) -> None:
        """Refuses a batch that cannot be split evenly."""
        count = self.mesh.size
        if batch_size % count:
            raise UserError(
                f'config.{field}: must be a multiple of {count}, the number of devices, '
                f'but is {batch_size}; nearest: {max(1, round(batch_size / count)) * count}'
            )

    def replicate(self, tree: Any) -> Any:
        """Returns the tree with every array whole on every device."""
        return jax.device_put(tree, self.replicated)

    def abstract(self, tree: Any) -> Any:
        """Returns shape, dtype and sharding of what replicate() gives for a tree like this."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.replicated),
            tree,
        )

    def split(self, array: np.ndarray) -> jax.Array:
        """Returns the array split along its leading axis, as the mapped function expects it."""
        if self.mapping == 'pmap':
            array = array.reshape(self.mesh.size, -1, *array.shape[1:])
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def map(
        self, function: Callable, split: tuple[bool, ...], donate: tuple[int, ...] = ()
    ) -> jax.stages.Wrapped:
        """Returns the per-device `function` mapped over the devices and jitted.

        Inside, collectives over AXIS see all devices. The results must not differ between
        devices; shard_map verifies that when it traces (check_vma).

        Args:
          function: of positional arguments.
          split: per argument, whether it comes from split() (else every device gets it whole).
          donate: arguments whose memory may be reused.
        """
        if self.mapping == 'pmap':
            return jax.pmap(
                function,
                axis_name=AXIS,
                in_axes=tuple(0 if is_split else None for is_split in split),
                out_axes=None,
                donate_argnums=donate,
                devices=self.mesh.devices.tolist(),
            )
        specs = tuple(PartitionSpec(AXIS) if is_split else PartitionSpec() for is_split in split)
        mapped = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec())
        return jax.jit(mapped, donate_argnums=donate)


def varying(tree: Any) -> Any:
    """Marks replicated arrays as this device's own copies, inside a mapped function.

    A gradient with respect to the result is this device's share alone, which pmean then averages
    over devices. Without the mark shard_map's transpose sums over devices first, and the mean
    would be too large by their number.
    """
    return jax.tree.map(lambda x: jax.lax.pcast(x, AXIS, to='varying'), tree)
