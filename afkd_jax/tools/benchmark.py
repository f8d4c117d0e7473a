"""--mode benchmark: how fast the train step of a config is, on the devices at hand.

Needs no data: images are random, of the set's shape. Every time is a median over blocks of steps,
without warm-up and compilation, and ends when its results are ready.
"""

import dataclasses
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afkd_jax.command import Command
from afkd_jax.config import Config
from afkd_jax.data import augment, dataset, pipelines
from afkd_jax.data.images import DeviceImages
from afkd_jax.data.pipelines.base import InMemory
from afkd_jax.devices import mesh
from afkd_jax.devices.memory import StepBytes
from afkd_jax.devices.mesh import BATCH_SHARDED, REPLICATED
from afkd_jax.report.console import log, print_json, working
from afkd_jax.report.tables import table as empty_table
from afkd_jax.report.versions import versions
from afkd_jax.tools import plan
from afkd_jax.tools import sweep as sweeps
from afkd_jax.training.run import Run

BLOCKS = 7
BLOCK_S = 0.5  # of steps in a block, at least; one step if it takes longer
_MOST_BYTES = 1 << 30  # of random images
PRODUCT = {'cpu': 2048}  # platform -> side of the matrices of the reference product
_LARGE_PRODUCT = 8192  # elsewhere, or dispatching would take longer


def _run(config: Config) -> Run:
    """Returns the run of a config on random images."""
    info = dataset.info(config)
    devices = mesh.devices_of(config)
    fit = _MOST_BYTES // int(np.prod(info.image_shape))
    count = max(config.batch_size, min(info.train, fit))
    info = dataclasses.replace(info, train=count, validation=0, test=0)
    rng = np.random.default_rng(config.seed)
    pixels = rng.integers(0, 256, (count, *info.image_shape), dtype=np.uint8)
    labels = rng.integers(0, info.num_classes, count, dtype=np.int32)
    mean_std = np.full(info.image_shape[-1], 0.5, np.float32)
    images = DeviceImages(pixels, labels, mean_std, mean_std / 2)  # pyright: ignore
    pipeline = pipelines.in_memory(config, info, devices, images, '')
    return Run(config, info, devices, pipeline)


def _median_of(function: Callable[[], Any]) -> float:
    """Returns the median seconds of some calls, after one that warms up."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(BLOCKS):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _product_flops(devices: mesh.Devices, dtype: str) -> float:
    """Returns the operations per second of a large matrix product on every device at once."""
    n = PRODUCT.get(devices.first.platform, _LARGE_PRODUCT)
    ones = np.ones((n * devices.shards, n), jnp.dtype(dtype))
    product = devices.map(lambda a, b: a @ b, (BATCH_SHARDED, REPLICATED), BATCH_SHARDED)
    rows, square = devices.split(ones), devices.replicate(ones[:n])
    return 2 * n**3 * devices.mesh.size / _median_of(lambda: product(rows, square))


def _peak_bytes(device: mesh.Device) -> int:
    """Returns the most memory used so far: of the device, else of this process."""
    if (stats := device.memory_stats()) and 'peak_bytes_in_use' in stats:
        return stats['peak_bytes_in_use']
    kilobyte = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


class Loop:
    """The training loop without logging and saving.

    Attributes:
      dispatch_s: of each step, the host's time for order, transfer and dispatch.
    """

    def __init__(self, run: Run, step: Callable[..., Any], key: jax.Array):
        self._run, self._step, self._key = run, step, key
        self._state, self._sums, self._taken = run.initial_state(random=True), run.zero_sums(), 0
        self.dispatch_s: list[float] = []

    def batch(self, step: int) -> tuple[Any, Any]:
        """Returns the batch of a step; after an epoch the same again."""
        order = self._run.order
        pipeline = self._run.pipeline
        assert isinstance(pipeline, InMemory)
        return pipeline.batch(order.indices(step % order.end_of(1)))

    def block(self, steps: int, queued: bool = False) -> float:
        """Returns the seconds per step of some steps.

        Args:
          steps: how many.
          queued: dispatch all of them at once, with batches made before, so that no device waits.
        """
        ready = [self.batch(self._taken + n) for n in range(steps)] if queued else None
        begin = time.perf_counter()
        for n in range(steps):
            before, start = self._sums, time.perf_counter()
            batch = ready[n] if ready else self.batch(self._taken)
            self._state, self._sums = self._step(self._state, before, *batch, self._key)
            self._taken += 1
            if not queued:
                self.dispatch_s.append(time.perf_counter() - start)
                before.steps.block_until_ready()
        self._sums.steps.block_until_ready()
        return (time.perf_counter() - begin) / steps


def step_time(config: Config) -> float:
    """Returns the seconds of a step, of three after two that warm up."""
    run = _run(config)
    step = run.lowered_step(*run.abstract_arguments()).compile()
    loop = Loop(run, step, run.devices.replicate(run.step_key))
    loop.block(2)
    return loop.block(3)


def benchmark(
    config: Config, more: Callable[[Loop, int], dict[str, Any]] = lambda loop, steps: {}
) -> dict[str, Any]:
    """Returns the times, operations and memory of one step, as JSON; seconds, bytes, operations.

    `step_s` is the median block's time per step in the training loop, `step_s_quartiles` its
    spread; `queued_step_s` that of steps that are dispatched all at once, so that the devices never
    wait for the host. `host_s` is the host's time between two steps: order, transfer and dispatch.
    `augment_s` is gathering and augmenting a batch. `flops_per_s` counts the operations of XLA's
    own analysis; on GPUs, where it does not see those of cuDNN, by plan.image_flops.
    `matmul_flops_per_s` is of a product of matrices of 2048 x 2048, not on CPUs of 8192 x 8192, in
    the same dtype, in the same process.

    Args:
      config: checked.
      more: takes the warm loop and the number of steps in a block, when all else is measured;
        returns what is added to the result.

    Raises:
      UserError: the config does not fit its images or devices.
    """
    run = _run(config)
    devices = run.devices
    key = devices.replicate(run.step_key)
    begin = time.perf_counter()
    lowered = run.lowered_step(*run.abstract_arguments())
    lower_s = time.perf_counter() - begin
    compiled = lowered.compile()
    compile_s = time.perf_counter() - begin

    loop = Loop(run, compiled, key)
    loop.block(2)
    steps = max(1, round(BLOCK_S / loop.block(2)))
    loop.dispatch_s.clear()
    # Alternating, because a machine's speed drifts.
    both = [(loop.block(steps), loop.block(steps, queued=True)) for _ in range(BLOCKS)]
    blocks, queued = zip(*both, strict=True)
    step_s, quartiles = statistics.median(blocks), statistics.quantiles(blocks, n=4)

    augmented = devices.map(
        lambda images, index_B, key: augment.training_batch(images, index_B, key, config.data),
        (run.pipeline.images_spec, BATCH_SHARDED, REPLICATED),
        BATCH_SHARDED,
    )
    batch = loop.batch(0)
    if devices.first.platform == 'gpu':
        flops = plan.image_flops(run.cohort) * config.batch_size
    else:
        cost = compiled.cost_analysis()
        assert cost
        flops = cost['flops'] * devices.mesh.size
    product = _product_flops(devices, config.dtype)
    return {
        'networks': list(config.networks),
        'method': config.method,
        'batch_size': config.batch_size,
        'dtype': config.dtype,
        'image_shape': list(run.info.image_shape),
        'device': devices.name,
        'machine': platform.processor() or platform.machine(),
        'cores': os.cpu_count(),
        'versions': versions(),
        'images_per_s': config.batch_size / step_s,
        'step_s': step_s,
        'step_s_quartiles': [quartiles[0], quartiles[2]],
        'steps': steps * BLOCKS,
        'lower_s': lower_s,
        'compile_s': compile_s,
        'flops_per_step': flops,
        'flops_per_s': flops / step_s,
        'matmul_flops_per_s': product,
        'share_of_matmul': flops / step_s / product,
        'queued_step_s': statistics.median(queued),
        'host_s': statistics.median(loop.dispatch_s),
        'augment_s': _median_of(lambda: augmented(*batch, key)),
        'planned_bytes': StepBytes.of(compiled).total,
        'peak_bytes': _peak_bytes(devices.first),
        **more(loop, steps),
    }


def table(result: dict[str, Any]) -> Any:
    """Returns a result as a table for the terminal."""
    names = ' + '.join(result['networks'])
    rows = empty_table(
        f'{names}, {result["method"]}, batch {result["batch_size"]}, {result["dtype"]}, '
        f'{result["device"]}',
        ('',),
    )
    low, high = result['step_s_quartiles']
    ms = 1e3
    for name, text in (
        ('images per second', f'{result["images_per_s"]:,.1f}'),
        ('step', f'{ms * result["step_s"]:,.2f} ms ({ms * low:,.2f} to {ms * high:,.2f})'),
        ('step, all dispatched at once', f'{ms * result["queued_step_s"]:,.2f} ms'),
        ('host, per step', f'{ms * result["host_s"]:,.2f} ms'),
        ('gather and augment', f'{ms * result["augment_s"]:,.2f} ms'),
        ('trace and compile', f'{result["compile_s"]:,.1f} s'),
        ('GFLOP/s', f'{result["flops_per_s"] / 1e9:,.1f}'),
        ('of a large matrix product', f'{100 * result["share_of_matmul"]:.0f} %'),
        ('memory of the step, planned', f'{result["planned_bytes"] / 1e6:,.0f} MB'),
        ('peak memory', f'{result["peak_bytes"] / 1e6:,.0f} MB'),
    ):
        rows.add_row(name, text)
    return rows


def main(command: Command, _: object) -> int:
    """Prints each result as a table, or as a line of JSON; returns the exit code."""
    file, sweep = pathlib.Path('runs/benchmark.csv'), command.options.sweep
    for config in sweeps.configs(command.config, sweep) if sweep else (command.config,):
        with working('measuring'):
            result = benchmark(config)
        log(table(result))
        if sweep:
            sweeps.append(result, file)
            log(f'appended to {file}')
        print_json(result)
    return 0
