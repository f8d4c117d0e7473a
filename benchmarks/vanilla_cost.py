"""Measures a pair's training step against two steps of plain training, one network each.

Command: python -m benchmarks.vanilla_cost NETWORK SIDE CHANNELS ROUNDS
Batch 128, float32; all take turns in one process; medians over the rounds, first calls excluded.
Plain training is a jitted value_and_grad and optax's SGD with momentum and weight decay.
"""

import functools
import statistics
import sys
import time

import jax
import numpy as np
import optax

from afkd_jax.config import Config
from afkd_jax.devices import mesh
from afkd_jax.devices.mesh import BATCH_SHARDED, REPLICATED
from afkd_jax.devices.spmd import DATA
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.method import state as state_lib
from afkd_jax.method import step as step_lib
from configs import default

BATCH, CLASSES = 128, 10


class Plain:
    """Two networks, trained one after the other."""

    def __init__(self, cohort, images, labels):
        rule = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))

        @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
        def step(params, stats, memory):
            def loss(params):
                variables = {'params': params, 'batch_stats': stats}
                (logits, _), new = cohort.networks[0].apply(
                    variables, images, True, mutable=['batch_stats']
                )
                entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return entropy.mean(), new['batch_stats']

            gradient, stats = jax.grad(loss, has_aux=True)(params)
            update, memory = rule.update(gradient, memory, params)
            return optax.apply_updates(params, update), stats, memory

        self.step, self.states = step, []
        for seed in (0, 1):
            variables = cohort.networks[0].init(jax.random.key(seed), images[:1], False)
            params = variables['params']
            self.states.append((params, variables['batch_stats'], rule.init(params)))

    def __call__(self):
        """Takes a step with each network."""
        self.states = [self.step(*state) for state in self.states]
        jax.block_until_ready(self.states)


class Ours:
    """One step of the pair, without gather and augmentation."""

    def __init__(self, cohort, images, labels):
        devices = mesh.arrange(mesh.available()[:1], 'shard_map')
        self.step = devices.map(
            functools.partial(step_lib.update, cohort),
            specs=(REPLICATED, BATCH_SHARDED, BATCH_SHARDED, REPLICATED),
            donate=(0,),
        )
        create = jax.jit(functools.partial(state_lib.create, cohort))
        self.state = devices.replicate(create(jax.random.key(0)))
        self.batch = devices.split(images), devices.split(labels)
        self.key = devices.replicate(jax.random.key(0))

    def __call__(self):
        """Takes a step."""
        self.state, _ = self.step(self.state, *self.batch, self.key)
        jax.block_until_ready(self.state)


def main(name: str, side: str, channels: str, rounds: str) -> None:
    """Prints the medians, and their ratios to plain training."""
    shape = int(side), int(side), int(channels)
    config = Config.of(default.get_config(f'{name},{name}'))
    rng = np.random.default_rng(0)
    images = rng.standard_normal((BATCH, *shape)).astype(np.float32)
    labels = rng.integers(0, CLASSES, BATCH).astype(np.int32)

    def assembled(method, axis_name):
        return cohort_lib.assemble(config.replace(method=method), shape, CLASSES, 50_000, axis_name)

    runners = {'plain': Plain(assembled('vanilla', None), images, labels)}
    for method in ('vanilla', 'afd'):
        runners[method] = Ours(assembled(method, DATA), images, labels)
    seconds = {label: [] for label in runners}
    for turn in range(int(rounds) + 2):
        for label, run in runners.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                seconds[label].append(time.perf_counter() - start)
    for label, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds['plain'], strict=True))
        print(f'{name} {label}: {1e3 * statistics.median(values):.0f} ms, {ratio:.2f} x plain')


if __name__ == '__main__':
    main(*sys.argv[1:])
