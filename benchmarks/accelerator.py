"""Measures this machine's devices: correctness, accuracy, speed, and the kernels of a step.

python -m benchmarks.accelerator [--small] [--minutes 9] [--only WORD] [--out FILE.json]
                                 [--peer SCRIPT [--peer_python PYTHON]]

For whatever devices JAX finds. The cases with the most to say come first; none is started when the
minutes are used up, and one that fails does not end the others. --only runs the cases whose name
contains the word; --small shrinks them all, to try the script on a CPU. --peer names a script that
times the step of two CIFAR ResNets in PyTorch and prints JSON with images_per_s (options: PEER); it
runs in alternation with the step here. --out writes all figures, after each case anew.
"""

import argparse
import collections
import contextlib
import functools
import gc
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import jax
import numpy as np

from afkd_jax.config import Config
from afkd_jax.devices import compile_cache, mesh
from afkd_jax.devices.mesh import BATCH_SHARDED, REPLICATED
from afkd_jax.devices.signals import Interrupt
from afkd_jax.devices.spmd import DATA
from afkd_jax.errors import typed_line
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.method import state as state_lib
from afkd_jax.method import step as step_lib
from afkd_jax.report.console import log
from afkd_jax.report.tables import table
from afkd_jax.report.versions import versions
from afkd_jax.tools import benchmark, hlo
from afkd_jax.training import loop
from benchmarks.plain_step import as_memory, plain_step
from configs import default, digits, imagenet

MIXED = ('resnet8', 'wrn-10-2')  # maps of 64 and 128 channels: the first has a transfer layer
# Part of a device's kind -> operations per second of dense products, by precision.
_H100 = {'float32 exact': 66.9e12, 'float32': 494.7e12, 'bfloat16': 989.4e12}
_A100 = {'float32 exact': 19.5e12, 'float32': 156e12, 'bfloat16': 312e12}
PEAKS = {'H100': _H100, 'H200': _H100, 'A100': _A100, 'TPU v5 lite': {'bfloat16': 197e12}}
# Precision -> (config.dtype, JAX's precision of products, the peer's options). 'float32' may use
# tf32 on GPUs, as JAX does by default.
PRECISIONS = {
    'float32': ('float32', None, ['--tf32']),
    'float32 exact': ('float32', 'highest', []),
    'bfloat16': ('bfloat16', None, ['--amp']),
}
CASES = (  # config, network, K, batch, precision
    (default, 'resnet32', 2, 128, 'bfloat16'),
    (default, 'resnet32', 2, 128, 'float32'),
    (imagenet, 'resnet18', 2, 128, 'bfloat16'),
    (default, 'resnet32', 2, 1024, 'bfloat16'),
    (default, 'wrn-28-10', 2, 128, 'bfloat16'),
    (default, 'resnet32', 4, 128, 'bfloat16'),
    (imagenet, 'resnet50', 2, 64, 'bfloat16'),
    (default, 'resnet32', 8, 128, 'bfloat16'),
    (default, 'resnet32', 2, 128, 'float32 exact'),
    (default, 'resnet32', 2, 1024, 'float32'),
    (default, 'wrn-28-10', 2, 128, 'float32'),
    (imagenet, 'resnet18', 2, 128, 'float32'),
    (imagenet, 'resnet50', 2, 64, 'float32'),
)
SMALL = ((digits, 'resnet8', 2, 16, 'float32'), (digits, 'resnet8', 2, 16, 'bfloat16'))
_NHWC = ['--layout', 'nhwc', '--forward', 'once']
PEER = {'eager': _NHWC, 'compiled': [*_NHWC, '--compile']}
_HAS_TORCH = 'import sys, torch; sys.exit(sys.argv[1] == "cuda" and not torch.cuda.is_available())'


def difference(found, expected):
    """Returns |found - expected| / |expected| of two trees, by L2 norm; the largest of a list."""
    if isinstance(expected, list):
        return max(map(difference, found, expected))
    pairs = [jax.tree.leaves(jax.device_get(tree)) for tree in (found, expected)]
    squares = [((np.float64(a) - b) ** 2).sum() for a, b in zip(*pairs, strict=True)]
    return float(np.sqrt(sum(squares) / sum((np.float64(b) ** 2).sum() for b in pairs[1])))


def compared(memory, plain):
    """Returns the largest differences over networks; the momenta of a first step are gradients."""
    kinds = {'parameters': ('params', 'discriminator'), 'momenta': ('velocity', 'm', 'dm')}
    return {
        kind: max(difference([a[n] for a in memory], [b[n] for b in plain]) for n in names)
        for kind, names in (kinds | {'statistics': ('stats',)}).items()
    }


def correctness(small, _):
    """Compares one step of a mixed pair with a second derivation in float64 on the host's CPU."""
    side, found = 8 if small else 32, mesh.available()
    batch = -(-(16 if small else 64) // len(found)) * len(found)
    config = Config.of(default.get_config(','.join(MIXED)))
    alone, mapped = (
        cohort_lib.assemble(config, (side, side, 3), 10, batch, axis) for axis in (None, DATA)
    )
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, side, side, 3)).astype(np.float32)
    labels = rng.integers(0, 10, batch).astype(np.int32)
    create = jax.jit(functools.partial(state_lib.create, alone))
    state = jax.device_get(create(jax.random.key(0)))

    def step(count, precision):
        devices = mesh.arrange(found[:count], 'shard_map')
        update = devices.map(
            lambda *arguments: step_lib.update(mapped, *arguments, jax.random.key(0)),
            (REPLICATED, BATCH_SHARDED, BATCH_SHARDED),
        )
        with products(precision):
            split = devices.split(images), devices.split(labels)
            state_, values = jax.device_get(update(devices.replicate(state), *split))
        logit = values['cross_entropy'] + values['mimicry_kl']
        losses = np.stack([logit, values['adversarial'], values['discriminator']])
        return as_memory(state_), losses

    results = {precision: step(1, precision) for precision in ('float32', 'float32 exact')}
    settings = {'temperature': config.loss.temperature, 'smoothing': 0.0}
    settings |= dict.fromkeys(('kl_weight', 'map_weight', 'adversarial_weight'), 1.0)
    rules = {'logit': config.logit, 'feature': config.feature}
    rules['discriminator'] = config.discriminator
    settings |= {f'{name}_rate': rule.learning_rate for name, rule in rules.items()}
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend='cpu')[0]):
        double = jax.tree.map(np.float64, (as_memory(state), images))
        teachers = ([1], [0]), (1, 0)
        plain = jax.jit(functools.partial(plain_step, alone, *teachers, 'adversarial', settings))
        memory, losses = jax.device_get(plain(*double, labels, 1))
    losses = np.array([[own[name] for own in losses] for name in rules])
    errors = {
        precision: compared(result, memory) | {'losses': difference(values, losses)}
        for precision, (result, values) in results.items()
    }
    if len(found) > 1:
        every, one = step(len(found), 'float32 exact')[0], results['float32 exact'][0]
        errors[f'{len(found)} devices, to one'] = compared(every, one)
    else:
        log('one device: it is not compared with several')
    columns = ('parameters', 'momenta', 'statistics', 'losses')
    rows = table('largest difference, to float64', columns)
    for name, error in errors.items():
        rows.add_row(name, *(f'{error[key]:.1e}' if key in error else '' for key in columns))
    log(rows)
    exact = (max(error.values()) for name, error in errors.items() if name != 'float32')
    # One of 10,000 activations on the other side of 0 changes a gradient by about 1e-3.
    return {'differences': errors, 'ok': max(exact) < 1e-2}


def demo(small, _):
    """Trains the digits demo, to at least 97 % on the test images with both networks."""
    config = Config.of(digits.get_config()).replace(epochs=1 if small else 20)
    with tempfile.TemporaryDirectory() as workdir, Interrupt() as interrupt:
        summary = loop.train(config, pathlib.Path(workdir) / 'run', None, interrupt)
    assert summary, 'stopped by a signal'
    accuracy = [network['test_accuracy'] for network in summary['networks']]
    log(f'test accuracy {accuracy[0]:.2f} and {accuracy[1]:.2f} %')
    return {'test_accuracy': accuracy, 'ok': small or min(accuracy) >= 97, **summary['seconds']}


def profile(measured, steps=3):
    """Returns the kernels of some steps that are queued all at once, from a trace."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            measured.block(steps, queued=True)
        (path,) = pathlib.Path(folder).glob('**/*.xplane.pb')
        return summarised(kernels(jax.profiler.ProfileData.from_file(str(path)).planes), steps)


def kernels(planes):
    """Returns (name, start, seconds) of the kernels of the first device, by their start.

    On a CPU these are the operations that the host's threads run; several run at once, and one that
    other threads continue ends with an event of its own.
    """
    planes = sorted(planes, key=lambda plane: plane.name)
    device = next((one.name for one in planes if one.name.startswith('/device:')), None)
    lines = itertools.chain.from_iterable(
        plane.lines for plane in planes if plane.name == (device or '/host:CPU')
    )
    found, ends = [], collections.defaultdict(list)
    for line in lines:
        if device and not line.name.startswith(('Stream', 'XLA Ops')):
            continue
        for event in line.events:
            if event.name.startswith('end: '):
                ends[event.name[5:]].append(event.start_ns / 1e9)
                continue
            operation = next((value for key, value in event.stats if key == 'hlo_op'), '')
            if device or operation:
                seconds = (event.start_ns / 1e9, event.duration_ns / 1e9)
                found.append((f'{event.name} {operation}', *seconds))
    found.sort(key=lambda event: event[1])
    later = {name: iter(sorted(times)) for name, times in ends.items()}
    return [
        (name, start, max(seconds, next(later.get(name.split()[0], iter(())), 0) - start))
        for name, start, seconds in found
    ]


def summarised(found, steps):
    """Returns the kinds, number and time of kernels() per step, and how long the device idles."""
    if not found:
        raise ValueError('the trace has no kernels')
    kinds, busy, end = {}, 0.0, found[0][1]
    for name, start, seconds in found:
        count, total = kinds.get(hlo.kind(name), (0, 0.0))
        kinds[hlo.kind(name)] = count + 1, total + seconds
        busy += max(0.0, start + seconds - max(start, end))
        end = max(end, start + seconds)
    window, whole = end - found[0][1], sum(total for _, total in kinds.values())
    largest = sorted(kinds.items(), key=lambda item: -item[1][1])
    return {
        'step_s': window / steps,
        'kernels_per_step': len(found) / steps,
        'median_kernel_s': statistics.median(seconds for *_, seconds in found),
        'idle_fraction': 1 - busy / window,
        'kinds': {
            name: {'per_step': count / steps, 's_per_step': total / steps, 'of_time': total / whole}
            for name, (count, total) in largest
        },
    }


def profile_table(result):
    """Returns a profile as a table."""
    rows = table('kind of kernel', ('per step', 'ms per step', '% of their time'))
    for name, row in result['kinds'].items():
        milliseconds, percent = 1e3 * row['s_per_step'], 100 * row['of_time']
        rows.add_row(name, f'{row["per_step"]:,.0f}', f'{milliseconds:.3f}', f'{percent:.1f}')
    step, median, idle = (result[key] for key in ('step_s', 'median_kernel_s', 'idle_fraction'))
    rows.add_row('queued step', f'{result["kernels_per_step"]:,.0f}', f'{1e3 * step:.3f}', '')
    rows.caption = f'median kernel {1e6 * median:.1f} us; the device idles {100 * idle:.0f} %'
    return rows


class Peer:
    """The script of --peer, in processes of its own: nothing here imports PyTorch.

    Attributes:
      missing: why it is not run; '' if it is.
    """

    def __init__(self, script, python):
        self._command = [python, script]
        self._device = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'
        self.missing = '' if script else 'no --peer is given'
        check = [python, '-c', _HAS_TORCH, self._device]
        if script and subprocess.run(check, capture_output=True).returncode:
            self.missing = f'{python} has no PyTorch for {self._device}'

    def images_per_s(self, *options):
        """Returns its speed, or NaN with a line if it fails."""
        steps = '30' if self._device == 'cuda' else '3'
        words = [*self._command, '--device', self._device, '--steps', steps, *map(str, options)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            log(f'peer {options}: {(done.stderr.strip().splitlines() or [""])[-1]}')
            return float('nan')
        return json.loads(done.stdout.strip().splitlines()[-1])['images_per_s']

    def beside(self, measured, steps, network, k, batch, precision):
        """Returns the speed here divided by that of each form of the peer, twice in alternation."""
        ratios = {form: [] for form in PEER}
        sizes = ['--depth', network.removeprefix('resnet'), '--networks', k, '--batch', batch]
        for _, (form, options) in itertools.product(range(2), PEER.items()):
            here = batch / measured.block(steps)
            there = self.images_per_s(*options, *PRECISIONS[precision][2], *sizes)
            ratios[form].append(here / there)
            log(f'{here:,.0f} img/s here / {there:,.0f} of the peer, {form}: {here / there:.2f}')
        return ratios


def products(precision):
    """Returns a context in which products have this precision."""
    name = PRECISIONS[precision][1]
    return jax.default_matmul_precision(name) if name else contextlib.nullcontext()


def speed(case, profiled, small, peer):
    """Measures one of CASES; for the figures see tools/benchmark.py."""
    file, network, k, batch, precision = case
    config = Config.of(file.get_config(','.join([network] * k)))
    config = config.replace(batch_size=batch, dtype=PRECISIONS[precision][0])

    def more(measured, steps):
        added = {}
        if not peer.missing and profiled and file is not imagenet:
            added['to_peer'] = peer.beside(measured, steps, network, k, batch, precision)
        if profiled:
            try:
                added['profile'] = profile(measured)
                log(profile_table(added['profile']))
            except Exception as error:  # the speed is measured all the same
                added['profile_error'] = typed_line(error)
                log(f'no profile: {typed_line(error)}')
        return added

    with products(precision):
        result = benchmark.benchmark(config, more)
    peaks = (peaks for name, peaks in PEAKS.items() if name in result['device'])
    peak = next(peaks, {}).get(precision)
    result['of_peak'] = peak and result['flops_per_s'] / peak / len(mesh.available())
    log(speed_table({'this case': result}))
    return result


def speed_table(results):
    """Returns the figures of cases as a table."""
    columns = ('img/s', 'step ms', 'queued', 'host', '% of product', '% of peak', 'MB planned')
    rows = table('case', columns)
    for name, result in results.items():
        if 'images_per_s' in result:
            times = (f'{1e3 * result[f"{key}_s"]:,.2f}' for key in ('step', 'queued_step', 'host'))
            product, peak = 100 * result['share_of_matmul'], 100 * (result['of_peak'] or 0)
            percents = f'{product:.0f}', f'{peak:.1f}' if peak else '-'
            planned = f'{result["planned_bytes"] / 1e6:,.0f}'
            rows.add_row(name, f'{result["images_per_s"]:,.0f}', *times, *percents, planned)
    return rows


@contextlib.contextmanager
def announced(name):
    """Prints what is being done every 5 seconds."""
    done, begin = threading.Event(), time.monotonic()

    def announce():
        while not done.wait(5):
            log(f'{name}: {time.monotonic() - begin:.0f} s')

    thread = threading.Thread(target=announce, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def cases(small):
    """Returns name -> function of (small, peer), in their order."""
    speeds = []
    for n, case in enumerate(SMALL if small else CASES):
        _, network, k, batch, precision = case
        name = f'{k} x {network}, batch {batch}, {precision}'
        speeds.append((name, functools.partial(speed, case, n < 3)))
    return dict([('correctness', correctness), speeds[0], ('digits', demo), *speeds[1:]])


def run(todo, minutes, small, peer, save):
    """Returns name -> result of each case, or its error; save(results) after each."""
    results, begin = {}, time.monotonic()
    for name, case in todo.items():
        if time.monotonic() - begin > 60 * minutes:
            results[name] = {'not_run': 'the time is used up'}
            log(f'not run, because the time is used up: {name}')
            continue
        log(f'--- {name}')
        try:
            with announced(name):
                results[name] = case(small, peer)
        except Exception as error:
            results[name] = {'error': typed_line(error), 'ok': False}
            log(f'{name}: {typed_line(error)}')
        save(results)
        gc.collect()  # the arrays of a case that failed
    save(results)
    return results


def main(arguments):
    """Runs the cases; returns the exit code: 1 if one failed."""
    parser = argparse.ArgumentParser(usage=__doc__)
    for flag in ('--small', '--only', '--minutes', '--out', '--peer', '--peer_python'):
        action = {'action': 'store_true'} if flag == '--small' else {}
        parser.add_argument(flag, **action)
    parser.set_defaults(only='', minutes=9, peer_python=sys.executable)
    options = parser.parse_args(arguments)
    if options.peer:  # else JAX takes three quarters of a GPU's memory
        os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.5')
    compile_cache.enable()
    if options.small:
        benchmark.BLOCKS, benchmark.BLOCK_S, benchmark.PRODUCT = 2, 0.01, {'cpu': 64}
    name = mesh.arrange(mesh.available(), 'shard_map').name
    log(f'{name}, jax {jax.__version__}')
    peer = Peer(options.peer, options.peer_python)
    if peer.missing:
        log(f'PyTorch is not measured: {peer.missing}')
    head = {'devices': name, 'versions': versions(), 'peer': peer.missing or options.peer}

    def save(results):
        if options.out:
            text = json.dumps(head | {'cases': results}, indent=1)
            pathlib.Path(options.out).write_text(text)

    todo = {name: case for name, case in cases(options.small).items() if options.only in name}
    results = run(todo, float(options.minutes), options.small, peer, save)
    log(speed_table(results))
    return int(any(result.get('ok') is False for result in results.values()))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
