"""--mode plan: what the train step needs on devices that need not exist.

The step is compiled ahead of time, for TPUs, GPUs or the devices at hand. All figures are
the compiler's estimates; nothing is run.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from afkd_jax.command import Command
from afkd_jax.config import Config
from afkd_jax.data import dataset, pipelines
from afkd_jax.devices import memory, mesh
from afkd_jax.devices.arrays import byte_count
from afkd_jax.devices.memory import StepBytes
from afkd_jax.errors import UserError
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.method import state as state_lib
from afkd_jax.report.console import log, print_json, working
from afkd_jax.report.tables import shape, size, table
from afkd_jax.tools import gpu, hlo, tpu
from afkd_jax.tools.flops import multiply_adds
from afkd_jax.training.run import Run

_IMAGES = {
    'device': 'the whole set on every device',
    'host': 'a batch at a time',
    'stream': 'a batch at a time',
}


class _TooLarge(Exception):
    """The compiler says that the step does not fit; the text is its own."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on devices that need not exist."""

    config: Config
    info: dataset.Info
    devices: mesh.Devices

    @property
    def memory(self) -> int | None:
        """Bytes of one device; None if unknown."""
        return memory.device_bytes(self.devices.first)

    def run(self, batch_size: int) -> Run:
        """Returns the run with this batch; it has only the shapes of its images."""
        config = self.config.replace(batch_size=batch_size)
        pipeline = pipelines.shapes_only(config, self.info, self.devices)
        return Run(config, self.info, self.devices, pipeline)

    def compile(self, batch_size: int) -> tuple[jax.stages.Compiled, float]:
        """Returns the compiled step, and how many seconds that took.

        Raises:
          _TooLarge: the compiler rejects it for lack of memory.
        """
        run = self.run(batch_size)
        begin = time.perf_counter()
        try:
            with working('compiling the training step'):
                step = run.lowered_step(*run.abstract_arguments()).compile()
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            raise _TooLarge(str(error)) from error
        return step, time.perf_counter() - begin

    def fits(self, batch_size: int) -> bool:
        """Returns whether a step of this batch fits into the memory of a device."""
        try:
            total = StepBytes.of(self.compile(batch_size)[0]).total
        except _TooLarge:
            return False
        return self.memory is None or total <= self.memory

    def largest_batch(self, log: Callable[[str], None]) -> int | None:
        """Returns the largest batch that fits, to an eighth; None if the smallest does not.

        Searched by compiling: powers of two times the number of shards, then their eighths.
        """
        shards, most = self.devices.shards, self.info.train
        tried: dict[int, bool] = {}

        def fits(batch: int) -> bool:
            if batch not in tried:
                log(f'trying a batch of {batch:,}')
                tried[batch] = self.fits(batch)
            return tried[batch]

        batch = shards
        while batch * 2 <= self.config.batch_size:
            batch *= 2
        while batch >= shards and not fits(batch):
            batch //= 2
        if batch < shards:
            return None
        while batch * 2 <= most and fits(batch * 2):
            batch *= 2
        step = max(shards, batch // 8 // shards * shards)
        best, worst = batch, 2 * batch
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
    """Returns the bytes of each part of the state on one device."""
    state = state_lib.abstract(cohort)
    parts = (*state.networks, *filter(None, [state.auxiliary, *state.discriminators]))
    return {
        'parameters': byte_count([part.params for part in parts]) // peers,
        'optimizer_states': byte_count([part.opt for part in parts]) // peers,
        'batch_statistics': byte_count([part.batch_stats for part in parts]) // peers,
        'averages': byte_count([part.ema for part in state.networks]) // peers,
    }


def image_flops(cohort: cohort_lib.Cohort, train: bool = True) -> int:
    """Returns the operations of all networks per image, in training or evaluation, by formula.

    Those of convolutions and matrix products of the networks; discriminators are left out.
    """
    return sum(_network_flops(cohort, k, train) for k in range(len(cohort.names)))


def _network_flops(cohort: cohort_lib.Cohort, k: int, train: bool = True) -> int:
    """Returns the operations per image of network k: the forward pass and, in training, pullbacks.

    Those of convolutions and matrix products, by formula, two per multiply-add.
    """
    module, state = cohort.networks[k], state_lib.abstract(cohort).networks[k]
    variables = state.variables()

    def passes(params: Any, image: Any, logits: Any, maps: Any) -> list[Any]:
        def forward(params: Any) -> Any:
            stats = variables['batch_stats']
            stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stats)
            return module.apply({'params': params, 'batch_stats': stats}, image, False)

        outputs, pull = jax.vjp(forward, params)
        if not (train and cohort.learns(k)):
            return [outputs]
        pulled = [pull((logits, maps))]
        if cohort.optimizers.feature:  # the same maps once more, for the other optimizer
            pulled.append(pull((logits, maps)))
        return pulled

    image = jax.ShapeDtypeStruct((1, *cohort.image_shape), jnp.float32)
    logits, maps = jax.eval_shape(lambda v, x: module.apply(v, x, False), variables, image)
    return 2 * multiply_adds(passes, variables['params'], image, logits, maps)


def plan(
    config: Config,
    topology: str | None,
    search: bool,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Returns what a config's train step needs and sends, as JSON.

    Args:
      config: checked.
      topology: a name of TPUs or GPUs; None for the devices at hand.
      search: whether to search the largest batch that fits.
      log: takes a line where one has to wait.

    Raises:
      UserError: the config does not fit its images or the mesh, or the topology is unavailable.
    """
    if config.mapping == 'pmap':
        raise UserError("config.mapping: a plan is of 'shard_map'; 'pmap' maps the same step")
    info = dataset.info(config)
    found = None
    if topology:
        found = gpu.devices(topology) if gpu.is_name(topology) else tpu.devices(topology)
    devices = mesh.devices_of(config, found)
    it = Plan(config, info, devices)
    whole = cohort_lib.assemble(config, info.image_shape, info.num_classes, info.train)
    result: dict[str, Any] = {
        'topology': topology,
        'device': devices.kind,
        'devices': devices.mesh.size,
        'mesh': {'peer': devices.peers, 'data': devices.shards},
        'method': config.method,
        'dtype': config.dtype,
        'batch_statistics': config.batch_statistics,
        'batch_size': config.batch_size,
        'image_shape': list(info.image_shape),
        'images': _IMAGES[it.run(config.batch_size).pipeline.placement],
        'memory_per_device': it.memory,
        'networks': [
            {'name': name, 'flops_per_image': _network_flops(whole, k)}
            for k, name in enumerate(whole.names)
        ],
    }
    log(f'compiling the step for {devices.kind}')
    parts = _state_bytes(whole, devices.peers)
    try:
        step, seconds = it.compile(config.batch_size)
    except _TooLarge as error:
        words = ' '.join(str(error).split())
        used = re.search(r'Used ([\d.]+\w) of ([\d.]+\w)', words)
        result |= {
            'fits': False,
            'bytes_per_device': {**parts, 'total': None},
            'why': f'{used[1]} are needed, {used[2]} exist' if used else words[:300],
        }
    else:
        needed = StepBytes.of(step)
        result |= {
            'fits': it.memory is None or needed.total <= it.memory,
            'bytes_per_device': {
                **parts,
                'images_and_other_arguments': needed.arguments - sum(parts.values()),
                'temporaries': needed.temporaries,
                'program': needed.program,
                'total': needed.total,
            },
            'collectives': [
                dataclasses.asdict(row)
                for row in hlo.collectives(step, (devices.peers, devices.shards))
            ],
            'compile_s': seconds,
        }
        if devices.first.platform == 'gpu':  # where the compiler counts no operations of cuDNN
            text = step.as_text() or ''
            result |= {'kernels': hlo.kernels(text), 'convolutions': hlo.convolutions(text)}
        else:
            cost = step.cost_analysis()
            assert cost
            flops = cost['flops'] * devices.mesh.size
            result |= {'flops_per_step': flops, 'flops_per_image': flops / config.batch_size}
    if search:
        result['largest_batch'] = it.largest_batch(log)
    return result


def tables(result: dict[str, Any]) -> list[Any]:
    """Returns the plan for the terminal: lines and tables."""
    where = f'{result["topology"]}: ' if result['topology'] else ''
    memory_table = table('per device', ('bytes',))
    for name, count in result['bytes_per_device'].items():
        memory_table.add_row(name.replace('_', ' '), size(count))
    memory_table.add_row('memory of the device', size(result['memory_per_device']))
    fits = 'it fits' if result['fits'] else 'it does not fit'
    parts: list[Any] = [
        f'{where}{result["device"]}; {result["method"]}, batch {result["batch_size"]:,}, '
        f'{result["dtype"]}, {shape(result["image_shape"])}; images: {result["images"]}. '
        "The compiler's estimates; nothing was run.",
        memory_table,
        fits + (f': {result["why"]}' if 'why' in result else ''),
    ]
    work = table('floating-point operations', ('',))
    if 'flops_per_step' in result:
        work.add_row('per step, all devices', f'{result["flops_per_step"]:.3e}')
        work.add_row('per image, all networks', f'{result["flops_per_image"]:.3e}')
    for k, network in enumerate(result['networks'], 1):
        work.add_row(
            f'per image, {k} {network["name"]}: convolutions and products only',
            f'{network["flops_per_image"]:.3e}',
        )
    parts.append(work)
    if 'collectives' in result:
        sent = table('collective', ('axis', 'count', 'bytes per device', 'largest'))
        for row in result['collectives']:
            values = row['axis'], str(row['count']), size(row['bytes']), size(row['largest'])
            sent.add_row(row['operation'], *values)
        parts += [sent if result['collectives'] else 'no collectives']
        parts.append(f'compiled in {result["compile_s"]:.1f} s')
    if 'kernels' in result:
        launched = table('kernels per step', ('',))
        for name, count in {**result['kernels'], 'total': sum(result['kernels'].values())}.items():
            launched.add_row(name, f'{count:,}')
        layouts = table('convolutions: type of the output, layouts', ('',))
        for name, count in result['convolutions'].items():
            layouts.add_row(name, f'{count:,}')
        parts += [launched, layouts]
    if 'largest_batch' in result:
        largest = result['largest_batch']
        parts.append(
            f'largest batch that fits, to an eighth: {largest:,}' if largest else 'no batch fits'
        )
    return parts


def main(command: Command, _: object) -> int:
    """Prints the plan, or it as JSON; returns the exit code."""
    options = command.options
    result = plan(command.config, options.topology, options.largest_batch, log)
    for part in tables(result):
        log(part)
    print_json(result)
    return 0
