"""The mesh: the devices of a run, how arrays are sharded over them, and how a step is mapped."""

import dataclasses
import functools
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from afkd_jax.config import Config
from afkd_jax.devices import xla_cpu
from afkd_jax.devices.spmd import DATA, PEER
from afkd_jax.errors import UserError, field_error

Device = Any  # jax.Device, which is no type for type checkers

# How an argument or a result of a mapped function is sharded; also as a tree of these.
REPLICATED = PartitionSpec()
BATCH_SHARDED = PartitionSpec(DATA)  # along the leading axis, the batch
PEER_SHARDED = PartitionSpec(PEER)  # along the leading axis, the networks


def available() -> list[Device]:
    """Returns the devices that JAX finds, those of all processes.

    Raises:
      UserError: JAX finds no device of the platform that JAX_PLATFORMS names.
    """
    try:
        return jax.devices()
    except RuntimeError as error:
        words = ' '.join(str(error).split())
        name = 'JAX_PLATFORM_NAME' if 'JAX_PLATFORM_NAME' in os.environ else 'JAX_PLATFORMS'
        raise UserError(
            f'{name}: JAX cannot use what it asks for ({words}); unset it, or install '
            'JAX for those devices (see README)'
        ) from error


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run; maps a per-device function by `jax.shard_map` under `jax.jit`."""

    mesh: Mesh

    @property
    def peers(self) -> int:
        """Devices over which the networks are sharded; 1: every device has all of them."""
        return self.mesh.shape.get(PEER, 1)

    @property
    def shards(self) -> int:
        """Shards of the batch."""
        return self.mesh.shape[DATA]

    @property
    def first(self) -> Device:
        """The first device."""
        return self.mesh.devices.flat[0]

    @property
    def processes(self) -> int:
        """The number of processes to which the devices belong."""
        return len({device.process_index for device in self.mesh.devices.flat})

    @property
    def name(self) -> str:
        """Number and kind, e.g. '8 x TPU v5e, 2 peer x 4 data, 2 processes'."""
        return self.kind + (f', {self.processes} processes' if self.processes > 1 else '')

    @property
    def kind(self) -> str:
        """The same without the processes."""
        kind = self.first.device_kind
        detail = f' ({platform.machine()})' if kind == 'cpu' else ''
        rows = f', {self.peers} {PEER} x {self.shards} {DATA}' if self.peers > 1 else ''
        return f'{self.mesh.size} x {kind}{detail}{rows}'

    def check_divides(self, field: str, batch_size: int) -> None:
        """Rejects a batch that cannot be split evenly."""
        count = self.shards
        if batch_size % count:
            what = 'the number of devices' if self.peers == 1 else f'the devices along {DATA}'
            rule = f'a multiple of {count} ({what})'
            nearest = max(1, round(batch_size / count)) * count
            raise UserError(f'{field_error(field, rule, batch_size)}; nearest: {nearest}')

    def shardings(self, specs: Any) -> Any:
        """Returns the sharding of every spec of a tree."""
        return jax.tree.map(functools.partial(NamedSharding, self.mesh), specs)

    def replicate(self, tree: Any) -> Any:
        """Returns host arrays or keys, the same in every process, whole on every device."""
        return jax.tree.map(lambda leaf: self._put(leaf, REPLICATED), tree)

    def abstract(self, tree: Any, specs: Any = REPLICATED) -> Any:
        """Returns shape, dtype and sharding of arrays like those of the tree, sharded by specs."""

        def one(spec: PartitionSpec, leaf: Any) -> jax.ShapeDtypeStruct:
            shape = self._split_shape(leaf.shape) if spec == BATCH_SHARDED else leaf.shape
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(self.mesh, spec))

        return jax.tree.map(
            lambda spec, part: jax.tree.map(functools.partial(one, spec), part), specs, tree
        )

    def split(self, array: np.ndarray) -> jax.Array:
        """Returns the array sharded along its leading axis, as the mapped function takes it."""
        return self._put(array.reshape(self._split_shape(array.shape)), BATCH_SHARDED)

    def rows(self, size: int) -> np.ndarray:
        """Returns which rows of a split array of this size are on this process's devices."""
        sharding = NamedSharding(self.mesh, BATCH_SHARDED)
        local = sharding.addressable_devices_indices_map((size,))
        return np.unique(np.concatenate([np.arange(size)[index] for index in local.values()]))

    def split_rows(self, rows: np.ndarray, size: int) -> jax.Array:
        """Returns split() of an array of which every process has its rows() only."""
        if len(rows) == size:
            return self.split(rows)
        local = self.rows(size)

        def part(index: Any) -> np.ndarray:
            return rows[np.searchsorted(local, np.arange(size)[index[0]])]

        sharding = NamedSharding(self.mesh, BATCH_SHARDED)
        return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, part)

    def _put(self, leaf: Any, spec: PartitionSpec) -> jax.Array:
        """Returns a host array on the devices; each process fills its own devices."""
        sharding = NamedSharding(self.mesh, spec)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = self._put(jax.random.key_data(leaf), spec)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def _split_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape in which an array of this shape is split along its leading axis."""
        return shape

    def map(
        self, function: Callable, specs: tuple, out: Any = REPLICATED, donate: tuple[int, ...] = ()
    ) -> jax.stages.Wrapped:
        """Returns the per-device function, mapped over the devices and jitted.

        Inside, collectives over DATA are among the devices that share the networks, those over PEER
        among the devices that share the batch. Results that are REPLICATED must be equal on all
        devices; shard_map verifies that at trace time (check_vma).

        Args:
          function: of positional arguments.
          specs: per argument, a spec or a tree of specs.
          out: of the results, likewise; what is BATCH_SHARDED has the shape of split().
          donate: arguments whose memory may be reused.
        """
        mapped = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out)
        options = xla_cpu.options(self.first.platform)
        return jax.jit(mapped, donate_argnums=donate, compiler_options=options)


class PmapDevices(Devices):
    """Maps by `jax.pmap`, over one process's devices along DATA; split arrays have that axis."""

    def _split_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.shards, shape[0] // self.shards, *shape[1:])

    def rows(self, size: int) -> np.ndarray:
        """See Devices; all rows are on the one process's devices."""
        return np.arange(size)

    def map(
        self, function: Callable, specs: tuple, out: Any = REPLICATED, donate: tuple[int, ...] = ()
    ) -> jax.stages.Wrapped:
        """See Devices."""
        axes = {REPLICATED: None, BATCH_SHARDED: 0}
        in_axes, out_axes = jax.tree.map(axes.__getitem__, (specs, out))
        return jax.pmap(
            function,
            axis_name=DATA,
            in_axes=in_axes,
            out_axes=out_axes,
            donate_argnums=donate,
            devices=self.mesh.devices.ravel().tolist(),
        )


def arrange(devices: Sequence[Device], mapping: str, peers: int = 1) -> Devices:
    """Returns a mesh of `peers` rows of these devices, neighbours next to each other."""
    shape = (peers, len(devices) // peers)
    try:
        grid = mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):
        # A part of a TPU slice that is no box: then in the order in which they are listed.
        grid = np.array(devices).reshape(shape)
    if mapping == 'pmap':  # its results live on a mesh with this one axis
        return PmapDevices(Mesh(grid.ravel(), (DATA,)))
    return Devices(Mesh(grid, (PEER, DATA)))


def devices_of(config: Config, found: Sequence[Device] | None = None) -> Devices:
    """Returns the devices of a config's mesh, chosen from `found` (None: those that JAX finds).

    Raises:
      UserError: there are no such devices, or networks and batch cannot be sharded over them.
    """
    found = available() if found is None else found
    peers, shards, networks = config.mesh.peer, config.mesh.data, config.networks
    processes = len({device.process_index for device in found})
    different = [f'{k} ({name})' for k, name in enumerate(networks, 1) if name != networks[0]]
    if peers > 1 and different:
        raise UserError(
            f'config.mesh.peer: networks that are sharded over {peers} devices must all be of one '
            f'architecture, but network 1 is {networks[0]} and others are not: '
            f'{", ".join(different)}; use config.mesh.peer=1'
        )
    if len(networks) % peers:
        raise field_error('mesh.peer', f'a divisor of the {len(networks)} networks', peers)
    if config.mapping == 'pmap' and (peers > 1 or processes > 1):
        raise UserError(
            "config.mapping: 'pmap' maps over one axis of one process's devices; use 'shard_map' "
            'with config.mesh.peer above 1, or with several processes'
        )
    if not shards and processes > 1 and len(found) % peers:
        rule = f'a divisor of the {len(found)} devices of all processes'
        raise field_error('mesh.peer', rule, peers)
    shards = shards or len(found) // peers
    count = peers * shards
    if not 0 < count <= len(found) or (processes > 1 and count < len(found)):
        fit = 'exactly ' if processes > 1 else 'at most '
        raise UserError(
            f'config.mesh: peer x data is {peers} x {shards or 1}, but there are {len(found)} '
            f'devices, of which {fit}{len(found)} can be used; 0 for config.mesh.data takes '
            'all of them'
        )
    devices = arrange(found[:count], config.mapping, peers)
    devices.check_divides('batch_size', config.batch_size)
    return devices
