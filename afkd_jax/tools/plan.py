"""--mode plan: what the real train step needs on devices that need not be there.

The step is compiled ahead of time, for a TPU topology or for the devices at hand, and what the
compiler knows of it is reported. All figures are the compiler's estimates; nothing is run.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from afkd_jax.data import dataset as sources
from afkd_jax.data import pipelines as feeds
from afkd_jax.devices import mesh as parallel
from afkd_jax.errors import UserError
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.method import state as state_lib
from afkd_jax.report import summary
from afkd_jax.tools import describe
from afkd_jax.tools import hlo as collectives
from afkd_jax.tools import tpu as topology_lib
from afkd_jax.training import run as run_lib

_IMAGES = {
    'device': 'the whole set on every device',
    'host': 'a batch at a time',
    'stream': 'a batch at a time',
}


class _TooLarge(Exception):
    """The compiler says that the step does not fit; the text is its own."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """What a compiled step needs on one device; outputs that take no argument's place."""

    arguments: int
    outputs: int
    temporaries: int
    program: int

    @classmethod
    def of(cls, step: jax.stages.Compiled) -> 'Bytes':
        """Returns what the compiler says."""
        memory = step.memory_analysis()
        return cls(
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes - memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.outputs + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on devices that need not be there.

    Attributes:
      config: valid.
      info: of its images.
      devices: the mesh.
    """

    config: ConfigDict
    info: sources.Info
    devices: parallel.Devices

    @property
    def memory(self) -> int | None:
        """Bytes of one device; None if not known."""
        return topology_lib.memory_of(self.devices.mesh.devices.flat[0])

    @property
    def placement(self) -> str:
        """Where the images are: see config.data.placement."""
        return feeds.placement(self.config, self.info, self.devices)

    def run(self, batch_size: int) -> run_lib.Run:
        """Returns the run with this batch; of its images only the shapes are known."""
        config = self.config.copy_and_resolve_references()
        config.batch_size = batch_size
        feed = feeds.Absent(config, self.info, self.devices, '', self.placement)
        return run_lib.Run(config, self.info, self.devices, feed)

    def compile(self, batch_size: int) -> tuple[jax.stages.Compiled, float]:
        """Returns the compiled step, and how many seconds that took.

        Raises:
          _TooLarge: the compiler refuses it for want of memory.
        """
        run = self.run(batch_size)
        begin = time.perf_counter()
        lowered = run.lowered_step(*run.abstract_arguments())
        try:
            step = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            raise _TooLarge(str(error)) from error
        return step, time.perf_counter() - begin

    def fits(self, batch_size: int) -> bool:
        """Returns whether a step of this batch fits into the memory of a device."""
        try:
            total = Bytes.of(self.compile(batch_size)[0]).total
        except _TooLarge:
            return False
        return self.memory is None or total <= self.memory

    def largest_batch(self, tell: Callable[[str], None]) -> int | None:
        """Returns the largest batch that fits, to an eighth; None if the smallest does not.

        Searched by compiling: powers of two times the number of shares, then their eighths.
        """
        share, most = self.devices.shares, self.info.train
        tried: dict[int, bool] = {}

        def fits(batch):
            if batch not in tried:
                tell(f'trying a batch of {batch:,}')
                tried[batch] = self.fits(batch)
            return tried[batch]

        size = share
        while size * 2 <= self.config.batch_size:
            size *= 2
        while size >= share and not fits(size):
            size //= 2
        if size < share:
            return None
        while size * 2 <= most and fits(size * 2):
            size *= 2
        step = max(share, size // 8 // share * share)
        best, worst = size, 2 * size
        while worst - best > step:
            middle = best + (worst - best) // 2 // step * step
            if middle in (best, worst):
                break
            if middle <= most and fits(middle):
                best = middle
            else:
                worst = middle
        return best


def _state_bytes(cohort: cohort_lib.Cohort, peers: int) -> dict[str, int]:
    """Returns the bytes that one device holds of each part of the state."""

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    state = state_lib.abstract(cohort)
    networks, judges = state.networks, state.discriminators
    return {
        'parameters': size([part.params for part in (*networks, *judges)]) // peers,
        'optimizer_states': size([part.opt for part in (*networks, *judges)]) // peers,
        'batch_statistics': size([network.batch_stats for network in networks]) // peers,
    }


def _network_flops(cohort: cohort_lib.Cohort, k: int) -> int:
    """Returns the operations per image of network k's forward pass and of its pullbacks.

    Those of convolutions and matrix products, by formula, two a multiply-add.
    """
    module, state = cohort.networks[k], state_lib.abstract(cohort).networks[k]
    variables = state.variables()

    def passes(params, image, logits, maps):
        def forward(params):
            stats = variables['batch_stats']
            stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stats)
            return module.apply({'params': params, 'batch_stats': stats}, image, False)

        _, pull = jax.vjp(forward, params)
        pulled = [pull((logits, maps))]
        if cohort.adversarial:  # the same maps once more, for the other optimizer
            pulled.append(pull((logits, maps)))
        return pulled

    image = jax.ShapeDtypeStruct((1, *cohort.image_shape), jnp.float32)
    logits, maps = jax.eval_shape(lambda v, x: module.apply(v, x, False), variables, image)
    return 2 * describe.multiply_adds(passes, variables['params'], image, logits, maps)


def plan(
    config: ConfigDict,
    topology: str | None,
    search: bool,
    tell: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:
    """Returns what a config's train step needs, and sends, as JSON.

    Args:
      config: valid.
      topology: a TPU's name; None for the devices at hand.
      search: whether to search the largest batch that fits.
      tell: is given a line where one waits.

    Raises:
      UserError: the config does not fit its images or the mesh, or the topology cannot be had.
    """
    if config.mapping == 'pmap':
        raise UserError("config.mapping: a plan is of 'shard_map'; 'pmap' maps the same step")
    info = sources.info(config)
    found = topology_lib.devices(topology) if topology else parallel.available()
    devices = run_lib.devices_of(config, found)
    it = Plan(config, info, devices)
    whole = cohort_lib.assemble(config, info.image_shape, info.num_classes, info.train)
    result = {
        'topology': topology,
        'device': devices.kind,
        'devices': devices.mesh.size,
        'mesh': {'peer': devices.peers, 'data': devices.shares},
        'method': config.method,
        'dtype': config.dtype,
        'batch_statistics': config.batch_statistics,
        'batch_size': config.batch_size,
        'image_shape': list(info.image_shape),
        'images': _IMAGES[it.placement],
        'memory_per_device': it.memory,
        'networks': [
            {'name': name, 'flops_per_image': _network_flops(whole, k)}
            for k, name in enumerate(whole.names)
        ],
    }
    tell(f'compiling the step for {devices.kind}')
    parts = _state_bytes(whole, devices.peers)
    try:
        step, seconds = it.compile(config.batch_size)
    except _TooLarge as error:
        words = ' '.join(str(error).split())
        used = re.search(r'Used ([\d.]+\w) of ([\d.]+\w)', words)
        result |= {
            'fits': False,
            'bytes_per_device': {**parts, 'total': None},
            'why': f'{used[1]} are needed, {used[2]} are there' if used else words[:300],
        }
    else:
        state = sum(parts.values())
        flops, needed = step.cost_analysis()['flops'] * devices.mesh.size, Bytes.of(step)
        result |= {
            'fits': it.memory is None or needed.total <= it.memory,
            'bytes_per_device': {
                **parts,
                'images_and_other_arguments': needed.arguments - state,
                'temporaries': needed.temporaries,
                'program': needed.program,
                'total': needed.total,
            },
            'flops_per_step': flops,
            'flops_per_image': flops / config.batch_size,
            'collectives': [
                dataclasses.asdict(row)
                for row in collectives.of(step, (devices.peers, devices.shares))
            ],
            'compile_s': seconds,
        }
    if search:
        result['largest_batch'] = it.largest_batch(tell)
    return result


def _size(count: float | None) -> str:
    if count is None:
        return '-'
    for unit, scale in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if count >= scale:
            return f'{count / scale:,.2f} {unit}'
    return f'{count:,.0f} B'


def tables(result: dict[str, Any]) -> list[Any]:
    """Returns the plan for the terminal: words, and tables."""
    where = f'{result["topology"]}: ' if result['topology'] else ''
    lines = [
        f'{where}{result["device"]}; {result["method"]}, batch {result["batch_size"]:,}, '
        f'{result["dtype"]}, {"x".join(map(str, result["image_shape"]))}; images: '
        f'{result["images"]}. Estimates of the compiler; nothing was run.'
    ]
    memory = summary.table('per device', ('bytes',))
    for name, count in result['bytes_per_device'].items():
        memory.add_row(name.replace('_', ' '), _size(count))
    memory.add_row('memory there is', _size(result['memory_per_device']))
    fits = 'it fits' if result['fits'] else 'it does not fit'
    parts: list[Any] = [*lines, memory, fits + (f': {result["why"]}' if 'why' in result else '')]
    work = summary.table('floating-point operations', ('',))
    if 'flops_per_step' in result:
        work.add_row('per step, all devices', f'{result["flops_per_step"]:.3e}')
        work.add_row('per image, all networks', f'{result["flops_per_image"]:.3e}')
    for k, network in enumerate(result['networks'], 1):
        work.add_row(
            f'per image, {k} {network["name"]}: convolutions and products alone',
            f'{network["flops_per_image"]:.3e}',
        )
    parts.append(work)
    if 'collectives' in result:
        columns = ('axis', 'count', 'bytes per device', 'largest')
        sent = summary.table('collective', columns)
        for row in result['collectives']:
            sent.add_row(
                row['operation'],
                row['axis'],
                str(row['count']),
                _size(row['bytes']),
                _size(row['largest']),
            )
        parts += [sent if result['collectives'] else 'no collectives']
        parts.append(f'compiled in {result["compile_s"]:.1f} s')
    if 'largest_batch' in result:
        largest = result['largest_batch']
        parts.append(
            f'largest batch that fits, to an eighth: {largest:,}' if largest else 'no batch fits'
        )
    return parts
