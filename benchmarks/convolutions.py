"""Times the gradient of a network with and without the CPU's forms of its convolutions.

python -m benchmarks.convolutions NETWORK BATCH

Random images of 32x32. Prints the median of 5 times of each, in alternation, in seconds, and their
ratio. Results: docs/performance.md.
"""

import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from afkd_jax import models
from afkd_jax.devices import xla_cpu
from afkd_jax.models import layers


def compiled(name, images):
    network = models.build(name, 100, images.shape[1:])
    variables = network.init(jax.random.key(0), images, False)

    def loss(params):
        (logits, _), _ = network.apply(
            {**variables, 'params': params}, images, True, mutable=['batch_stats']
        )
        return (logits**2).mean()

    step = jax.jit(jax.grad(loss)).lower(variables['params'])
    step = step.compile(compiler_options=xla_cpu.options(jax.default_backend()))
    return lambda: jax.block_until_ready(step(variables['params']))


def main(name, batch):
    images = jnp.asarray(jax.random.normal(jax.random.key(1), (int(batch), 32, 32, 3)))
    steps = {'own forms': compiled(name, images)}
    plain = jax.lax.conv_general_dilated
    layers.conv = functools.partial(layers.conv, conv_general_dilated=plain)
    layers.layers.cache_clear()
    steps['XLA'] = compiled(name, images)
    times = {form: [] for form in steps}
    for _ in range(6):
        for form, step in steps.items():
            start = time.perf_counter()
            step()
            times[form].append(time.perf_counter() - start)
    medians = {form: statistics.median(found[1:]) for form, found in times.items()}
    ratio = medians['XLA'] / medians['own forms']
    print(name, batch, {form: round(s, 3) for form, s in medians.items()}, f'ratio {ratio:.1f}')


if __name__ == '__main__':
    main(*sys.argv[1:])
