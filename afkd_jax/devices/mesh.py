"""Devices: the mesh, where arrays live, and the one function that maps a step over devices."""

import dataclasses
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from afkd_jax.devices import xla_cpu as cpu
from afkd_jax.errors import UserError

# The axes of the mesh: networks are spread over PEER, the batch is split over DATA.
PEER, DATA = 'peer', 'data'

# Where an argument or a result of a mapped function lives; also as a tree of these.
WHOLE = PartitionSpec()  # on every device
SPLIT = PartitionSpec(DATA)  # along its leading axis, the batch
SPREAD = PartitionSpec(PEER)  # along its leading axis, the networks


def available() -> list[jax.Device]:
    """Returns the devices that JAX finds, those of all processes.

    Raises:
      UserError: JAX finds no device of the platform that it is told to use.
    """
    try:
        return jax.devices()
    except RuntimeError as error:
        words = ' '.join(str(error).split())
        raise UserError(
            f'JAX_PLATFORMS: JAX cannot use what it asks for ({words}); unset it, or install '
            'JAX for those devices (see README)'
        ) from error


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run and how a per-device function is mapped over them.

    Attributes:
      mesh: all devices, on the axes PEER and DATA; for pmap on DATA alone.
      mapping: 'shard_map' (under jit) or 'pmap'. They map the very same function.
    """

    mesh: Mesh
    mapping: str

    @classmethod
    def take(cls, mapping: str, count: int | None = None, peers: int = 1) -> 'Devices':
        """Returns the first `count` devices, all of them by default; see arrange()."""
        return cls.arrange(available()[:count], mapping, peers)

    @classmethod
    def arrange(cls, devices: Sequence[jax.Device], mapping: str, peers: int = 1) -> 'Devices':
        """Returns these devices as a mesh of `peers` rows, neighbours next to each other."""
        shape = (peers, len(devices) // peers)
        try:
            grid = mesh_utils.create_device_mesh(
                shape, list(devices), allow_split_physical_axes=True
            )
        except (AssertionError, NotImplementedError, ValueError):
            # Of a TPU's devices a part that is no box of its own: then as they are listed.
            grid = np.array(devices).reshape(shape)
        if mapping == 'pmap':  # it has one axis, and its results live on a mesh of that
            return cls(Mesh(grid.ravel(), (DATA,)), mapping)
        return cls(Mesh(grid, (PEER, DATA)), mapping)

    @property
    def peers(self) -> int:
        """Over how many devices the networks are spread; 1: every device has all of them."""
        return self.mesh.shape.get(PEER, 1)

    @property
    def shares(self) -> int:
        """Into how many parts the batch is split."""
        return self.mesh.shape[DATA]

    @property
    def processes(self) -> int:
        """To how many processes the devices belong."""
        return len({device.process_index for device in self.mesh.devices.flat})

    @property
    def name(self) -> str:
        """How many devices of which kind, e.g. '8 x TPU v5e, 2 peer x 4 data, 2 processes'."""
        return self.kind + (f', {self.processes} processes' if self.processes > 1 else '')

    @property
    def kind(self) -> str:
        """The same without the processes."""
        kind = self.mesh.devices.flat[0].device_kind
        detail = f' ({platform.machine()})' if kind == 'cpu' else ''
        rows = f', {self.peers} {PEER} x {self.shares} {DATA}' if self.peers > 1 else ''
        return f'{self.mesh.size} x {kind}{detail}{rows}'

    def sharding(self, place: PartitionSpec) -> NamedSharding:
        """Returns a place on these devices."""
        return NamedSharding(self.mesh, place)

    def shardings(self, places: Any) -> Any:
        """Returns sharding() of every place of a tree."""
        return jax.tree.map(
            self.sharding, places, is_leaf=lambda place: isinstance(place, PartitionSpec)
        )

    def check_divides(self, field: str, batch_size: int) -> None:
        """Refuses a batch that cannot be split evenly."""
        count = self.shares
        if batch_size % count:
            what = 'the number of devices' if self.peers == 1 else f'the devices along {DATA}'
            raise UserError(
                f'config.{field}: must be a multiple of {count}, {what}, '
                f'but is {batch_size}; nearest: {max(1, round(batch_size / count)) * count}'
            )

    def replicate(self, tree: Any) -> Any:
        """Returns the tree with every array whole on every device.

        Args:
          tree: host arrays or keys, the same in every process.
        """
        return jax.tree.map(lambda leaf: self._put(leaf, WHOLE), tree)

    def abstract(self, tree: Any, places: Any = WHOLE) -> Any:
        """Returns shape, dtype and sharding of arrays like those of the tree at these places.

        Of what is SPLIT, as split() returns it.
        """

        def like(place, part):
            sharding = self.sharding(place)

            def one(leaf):
                shape = leaf.shape
                if self.mapping == 'pmap' and place == SPLIT:
                    shape = (self.shares, shape[0] // self.shares, *shape[1:])
                return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

            return jax.tree.map(one, part)

        return jax.tree.map(
            like, places, tree, is_leaf=lambda place: isinstance(place, PartitionSpec)
        )

    def split(self, array: np.ndarray) -> jax.Array:
        """Returns the array split along its leading axis, as the mapped function expects it."""
        if self.mapping == 'pmap':
            array = array.reshape(self.shares, -1, *array.shape[1:])
        return self._put(array, SPLIT)

    def rows(self, size: int) -> np.ndarray:
        """Returns which rows of a split array of this size live on this process's devices."""
        if self.mapping == 'pmap':  # of one process
            return np.arange(size)
        own = self.sharding(SPLIT).addressable_devices_indices_map((size,))
        return np.unique(np.concatenate([np.arange(size)[index] for index in own.values()]))

    def split_rows(self, rows: np.ndarray, size: int) -> jax.Array:
        """Returns split() of an array of which every process has its rows() alone."""
        if len(rows) == size:
            return self.split(rows)
        own = self.rows(size)

        def part(index):
            return rows[np.searchsorted(own, np.arange(size)[index[0]])]

        return jax.make_array_from_callback((size, *rows.shape[1:]), self.sharding(SPLIT), part)

    def _put(self, leaf: Any, place: PartitionSpec) -> jax.Array:
        """Returns a host array, of which each process feeds its own devices."""
        sharding = self.sharding(place)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = self._put(jax.random.key_data(leaf), place)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def map(
        self,
        function: Callable,
        places: tuple[Any, ...],
        out: Any = WHOLE,
        donate: tuple[int, ...] = (),
    ) -> jax.stages.Wrapped:
        """Returns the per-device `function` mapped over the devices and jitted.

        Inside, collectives over DATA see the devices that share the batch, those over PEER the
        devices that share the networks. Results that are WHOLE must not differ between devices;
        shard_map verifies that when it traces (check_vma).

        Args:
          function: of positional arguments.
          places: per argument, a place or a tree of places.
          out: of the results, likewise; what is SPLIT comes as split() gives it.
          donate: arguments whose memory may be reused.
        """
        if self.mapping == 'pmap':
            axes = {WHOLE: None, SPLIT: 0}

            def axis(places):
                return jax.tree.map(
                    axes.get, places, is_leaf=lambda place: isinstance(place, PartitionSpec)
                )

            return jax.pmap(
                function,
                axis_name=DATA,
                in_axes=axis(places),
                out_axes=axis(out),
                donate_argnums=donate,
                devices=self.mesh.devices.ravel().tolist(),
            )
        mapped = jax.shard_map(function, mesh=self.mesh, in_specs=places, out_specs=out)
        options = cpu.options(self.mesh.devices.flat[0].platform)
        return jax.jit(mapped, donate_argnums=donate, compiler_options=options)


def arrange(
    peers: int,
    shares: int,
    networks: tuple[str, ...],
    mapping: str,
    devices: Sequence[jax.Device],
) -> Devices:
    """Returns the devices of a config's mesh.

    Args:
      peers: config.mesh.peer.
      shares: config.mesh.data; 0: as many as there are.
      networks: config.networks.
      mapping: config.mapping.
      devices: those that there are.

    Raises:
      UserError: there are no such devices, or the networks cannot be spread over them.
    """
    processes = len({device.process_index for device in devices})
    different = [f'{k} ({name})' for k, name in enumerate(networks, 1) if name != networks[0]]
    if peers > 1 and different:
        raise UserError(
            f'config.mesh.peer: networks that are spread over {peers} devices must all be of one '
            f'architecture, but network 1 is {networks[0]} and others are not: '
            f'{", ".join(different)}; use config.mesh.peer=1'
        )
    if len(networks) % peers:
        raise UserError(
            f'config.mesh.peer: must divide the number of networks, {len(networks)}, but is {peers}'
        )
    if mapping == 'pmap' and (peers > 1 or processes > 1):
        raise UserError(
            "config.mapping: 'pmap' maps over one axis of one process's devices; use 'shard_map' "
            'with config.mesh.peer above 1, or with several processes'
        )
    if not shares and processes > 1 and len(devices) % peers:
        raise UserError(
            f'config.mesh.peer: must divide the number of devices of all processes, '
            f'{len(devices)}, but is {peers}'
        )
    shares = shares or len(devices) // peers
    count = peers * shares
    if not 0 < count <= len(devices) or (processes > 1 and count < len(devices)):
        fit = 'exactly ' if processes > 1 else 'at most '
        raise UserError(
            f'config.mesh: peer x data is {peers} x {shares or 1}, but there are {len(devices)} '
            f'devices, of which {fit}{len(devices)} can be used; 0 for config.mesh.data takes '
            'what there is'
        )
    return Devices.arrange(devices[:count], mapping, peers)


def varying(tree: Any) -> Any:
    """Marks arrays that devices share as this device's own copies, inside a mapped function.

    A gradient with respect to the result is this device's share alone, which pmean then averages
    over devices. Without the mark shard_map's transpose sums over devices first, and the mean
    would be too large by their number.
    """
    return jax.tree.map(lambda x: jax.lax.pcast(x, DATA, to='varying'), tree)


def rolled(own_L: jax.Array, places: int, axis: str) -> jax.Array:
    """Returns this device's part of jnp.roll(whole, places) over the leading axis.

    Inside a mapped function, where the whole is split over the devices along the mesh axis. Only
    what leaves its device is sent: for a roll by one, the last of the L entries.
    """
    count = jax.lax.axis_size(axis)
    devices, rest = divmod(places, len(own_L))
    parts = [
        (own_L[len(own_L) - rest :], devices + 1),
        (own_L[: len(own_L) - rest], devices),
    ]
    return jnp.concatenate([_sent(part, by, axis, count) for part, by in parts if len(part)])


def _sent(part: jax.Array, places: int, axis: str, count: int) -> jax.Array:
    """Returns what the device `places` before this one has; its own where that is itself."""
    if places % count == 0:
        return part
    return jax.lax.ppermute(part, axis, [(p, (p + places) % count) for p in range(count)])
