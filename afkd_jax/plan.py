"""--mode plan: what the real train step needs on devices that need not be there.

The step is compiled ahead of time, for a TPU topology or for the devices at hand, and what the
compiler knows of it is reported. All figures are the compiler's estimates; nothing is run.
"""

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.table
from jax.experimental import topologies
from ml_collections import ConfigDict

from afkd_jax import cohort as cohort_lib
from afkd_jax import collectives, describe, parallel
from afkd_jax import run as run_lib
from afkd_jax import state as state_lib
from afkd_jax.data import augment, sources
from afkd_jax.errors import UserError

# Memory of one device in bytes, where the runtime does not tell: a chip of v4 on, a core before.
_MEMORY = {
    'TPU v2': 8 * 2**30,
    'TPU v3': 16 * 2**30,
    'TPU v4': 32 * 2**30,
    'TPU v5 lite': 16 * 2**30,
    'TPU v5': 95 * 2**30,
    'TPU v6 lite': 32 * 2**30,
}
# Chips -> their layout, as the generations arrange them.
_FLAT = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
_CUBES = {
    4: '2x2x1',
    8: '2x2x2',
    16: '2x2x4',
    32: '2x4x4',
    64: '4x4x4',
    128: '4x4x8',
    256: '4x8x8',
    512: '8x8x8',
}
_SQUARES = {4: '2x2', 16: '4x4', 64: '8x8', 256: '16x16'}
# Generation -> (cores that its names count per chip, layouts).
_GENERATIONS = {
    'v2': (2, _SQUARES),
    'v3': (2, _SQUARES),
    'v4': (2, _CUBES),
    'v5e': (1, _FLAT),
    'v5litepod': (1, _FLAT),
    'v5p': (2, _CUBES),
    'v6e': (1, _FLAT),
}
# A set larger than this share of a device's memory is planned as if it came batch by batch.
_WHOLE_SET = 0.25


def layout_of(name: str) -> tuple[str, str]:
    """Returns (generation, layout) of a TPU's name: 'v5e-16' -> ('v5e', '4x4').

    A name with a colon, such as 'v5e:4x4', has both already.

    Raises:
      UserError: there is no such TPU.
    """
    if match := re.fullmatch(r'(v\w+):(\d+(?:x\d+)+)', name):
        generation, layout = match.groups()
        if generation in _GENERATIONS:
            return generation.replace('v5litepod', 'v5e'), layout
    if match := re.fullmatch(r'(v\w+)-(\d+)', name):
        generation, size = match[1], int(match[2])
        if generation in _GENERATIONS:
            per_chip, layouts = _GENERATIONS[generation]
            if size % per_chip == 0 and size // per_chip in layouts:
                return generation.replace('v5litepod', 'v5e'), layouts[size // per_chip]
            sizes = ', '.join(f'{generation}-{chips * per_chip}' for chips in layouts)
            raise UserError(f'--topology: there is no {name}; there are {sizes}')
    raise UserError(
        f'--topology: {name} is not known; name a TPU by generation and size, as v5e-16, or by its '
        f'layout, as v5e:4x4; generations: {", ".join(_GENERATIONS)}'
    )


def topology_devices(name: str) -> Sequence[Any]:
    """Returns the devices of a TPU that need not be there.

    Raises:
      UserError: there is no such TPU, or its compiler is not installed.
    """
    generation, layout = layout_of(name)
    # It would look for the machine's own TPU first, and wait for an answer.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    # No chip is used, so it does not matter who uses one.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    options: dict[str, Any] = {}
    if math.prod(map(int, layout.split('x'))) == 1:
        options['chips_per_host_bounds'] = (1, 1, 1)
    if generation == 'v4':  # as it is used: both cores of a chip are one device
        options['chip_config_name'] = 'megacore'
    try:
        with _silent():
            description = topologies.get_topology_desc(
                platform='tpu', topology_name=f'{generation}:{layout}', **options
            )
    except Exception as error:  # whatever the compiler's loader raises
        words = ' '.join(str(error).split())
        if 'not installed' in words:
            raise UserError(
                f'--topology: {name} needs the compiler for TPUs, which is not installed: '
                f'python -m pip install "jax[tpu]=={jax.__version__}"'
            ) from error
        raise UserError(f'--topology: {name} cannot be had ({words[:300]})') from error
    return description.devices


@contextlib.contextmanager
def _silent():
    """Lets the compiler's loader print nothing: it complains of the TPU that is not there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def memory_of(device: Any) -> int | None:
    """Returns the bytes of a device's memory; None if they are not known."""
    if device.platform == 'cpu':  # all share that of the machine
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    with contextlib.suppress(Exception):  # what is not there has no statistics
        return device.memory_stats()['bytes_limit']
    return _MEMORY.get(device.device_kind)


class _TooLarge(Exception):
    """The compiler says that the step does not fit; the text is its own."""


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A compiled step, and what a device needs for it in bytes."""

    step: jax.stages.Compiled
    seconds: float
    arguments: int
    temporaries: int
    program: int
    total: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on devices that need not be there.

    Attributes:
      config: valid.
      info: of its images.
      devices: the mesh.
      topology: the name that the user gave; None for the devices at hand.
    """

    config: ConfigDict
    info: sources.Info
    devices: parallel.Devices
    topology: str | None

    @property
    def memory(self) -> int | None:
        """Bytes of one device; None if not known."""
        return memory_of(self.devices.mesh.devices.flat[0])

    @property
    def streamed(self) -> bool:
        """Whether the set is too large to lie on every device, and comes batch by batch.

        So it is only in a plan: this program cannot train on such a set yet.
        """
        count = self.info.train + self.info.validation + self.info.test
        size = count * math.prod(self.info.image_shape)
        return self.memory is not None and size > _WHOLE_SET * self.memory

    def run(self, batch_size: int) -> run_lib.Run:
        """Returns the run with this batch; its images are shapes."""
        config = self.config.copy_and_resolve_references()
        config.batch_size = batch_size
        info, devices = self.info, self.devices
        cohort = cohort_lib.assemble(
            config, info.image_shape, info.num_classes, info.train, parallel.DATA, devices.peers
        )
        count = batch_size if self.streamed else info.train + info.validation + info.test
        channels = info.image_shape[-1:]
        table = augment.Table(
            jax.ShapeDtypeStruct((count, *info.image_shape), jnp.uint8),
            jax.ShapeDtypeStruct((count,), jnp.int32),
            jax.ShapeDtypeStruct(channels, jnp.float32),
            jax.ShapeDtypeStruct(channels, jnp.float32),
        )
        return run_lib.Run(config, info, cohort, devices, table, images_fingerprint='')

    def compile(self, batch_size: int) -> _Compiled:
        """Returns the compiled step.

        Raises:
          _TooLarge: the compiler refuses it for want of memory.
        """
        run, devices, split = self.run(batch_size), self.devices, parallel.SPLIT
        place = parallel.WHOLE
        if self.streamed:
            place = augment.Table(split, split, parallel.WHOLE, parallel.WHOLE)
        state, sums = run.abstract()
        images = devices.abstract(run.images, place)
        index = devices.abstract(jax.ShapeDtypeStruct((batch_size,), np.int32), split)
        key = devices.abstract(jax.eval_shape(lambda: jax.random.key(0)))
        begin = time.perf_counter()
        lowered = run.lowered_step(state, sums, images, index, key, place)
        try:
            step = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            raise _TooLarge(str(error)) from error
        seconds = time.perf_counter() - begin
        memory = step.memory_analysis()
        output = memory.output_size_in_bytes - memory.alias_size_in_bytes
        arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        program = memory.generated_code_size_in_bytes
        total = arguments + output + temporaries + program
        return _Compiled(step, seconds, arguments, temporaries, program, total)

    def fits(self, batch_size: int) -> bool:
        """Returns whether a step of this batch fits into the memory of a device."""
        try:
            total = self.compile(batch_size).total
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


def _state_bytes(run: run_lib.Run) -> dict[str, int]:
    """Returns the bytes that one device holds of each part of the state."""

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    state = state_lib.abstract(run.cohort)
    peers, networks, judges = run.devices.peers, state.networks, state.discriminators
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
    info = sources.info(config)
    found = topology_devices(topology) if topology else parallel.available()
    mesh = config.mesh
    devices = parallel.arrange(mesh.peer, mesh.data, tuple(config.networks), config.mapping, found)
    devices.check_divides('batch_size', config.batch_size)
    it = Plan(config, info, devices, topology)
    run = it.run(config.batch_size)
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
        'images': 'a batch at a time' if it.streamed else 'the whole set on every device',
        'memory_per_device': it.memory,
        'networks': [
            {'name': name, 'flops_per_image': _network_flops(whole, k)}
            for k, name in enumerate(whole.names)
        ],
    }
    tell(f'compiling the step for {devices.kind}')
    parts = _state_bytes(run)
    try:
        compiled = it.compile(config.batch_size)
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
        flops = compiled.step.cost_analysis()['flops'] * devices.mesh.size
        result |= {
            'fits': it.memory is None or compiled.total <= it.memory,
            'bytes_per_device': {
                **parts,
                'images_and_other_arguments': compiled.arguments - state,
                'temporaries': compiled.temporaries,
                'program': compiled.program,
                'total': compiled.total,
            },
            'flops_per_step': flops,
            'flops_per_image': flops / config.batch_size,
            'collectives': [
                dataclasses.asdict(row)
                for row in collectives.of(compiled.step, (devices.peers, devices.shares))
            ],
            'compile_s': compiled.seconds,
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
    memory = rich.table.Table(box=rich.box.SIMPLE)
    memory.add_column('per device')
    memory.add_column('bytes', justify='right')
    for name, count in result['bytes_per_device'].items():
        memory.add_row(name.replace('_', ' '), _size(count))
    memory.add_row('memory there is', _size(result['memory_per_device']))
    fits = 'it fits' if result['fits'] else 'it does not fit'
    parts: list[Any] = [*lines, memory, fits + (f': {result["why"]}' if 'why' in result else '')]
    work = rich.table.Table(box=rich.box.SIMPLE)
    work.add_column('floating-point operations')
    work.add_column('', justify='right')
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
        sent = rich.table.Table(box=rich.box.SIMPLE)
        for name in ('collective', 'axis', 'count', 'bytes per device', 'largest'):
            sent.add_column(name, justify='left' if name in ('collective', 'axis') else 'right')
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
