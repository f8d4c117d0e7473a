"""Devices: their number and the mapping change nothing; one trace per run."""

import functools

import chex
import jax
import numpy as np
import pytest
from conftest import (
    as_float64,
    initial_state,
    mapped_update,
    random_batch,
    relative_difference,
    tiny_cohort,
    tiny_config,
)

from afkd_jax import metrics, parallel
from afkd_jax import step as step_lib
from afkd_jax.data import augment
from afkd_jax.errors import UserError
from afkd_jax.parallel import SPLIT, WHOLE

BATCH = 16


@functools.cache
def after_three_steps(mapping, count):
    """Returns (state, sums) after three whole steps: gather, augment, learn, sum."""
    # Maps of two sizes, and dropout.
    config = tiny_config(('tiny-4-2', 'tiny-6-1-drop'), batch_size=BATCH)
    devices = parallel.Devices.take(mapping, count)
    cohort = tiny_cohort(config, parallel.DATA)
    rng = np.random.default_rng(0)
    images = augment.Table(
        pixels=rng.integers(0, 256, (64, 8, 8, 1), np.uint8),
        labels=rng.integers(0, 10, 64).astype(np.int32),
        mean=np.array([0.4]),
        std=np.array([0.3]),
    )
    step = devices.map(
        functools.partial(step_lib.train_step, cohort, 1, True),
        places=(WHOLE, WHOLE, WHOLE, SPLIT, WHOLE),
        donate=(0,),
    )
    state, sums, images, key = devices.replicate(
        (
            as_float64(initial_state(config)),
            as_float64(metrics.zeros(step_lib.value_shapes(cohort))),
            images,
            jax.random.key(1),
        )
    )
    for t in range(3):
        index = devices.split(np.arange(t * BATCH, (t + 1) * BATCH, dtype=np.int32))
        state, sums = step(state, sums, images, index, key)
    return jax.device_get((state, sums))


@pytest.mark.parametrize(
    ('mapping', 'count'), [('shard_map', 2), ('shard_map', 8), ('pmap', 1), ('pmap', 2)]
)
def test_devices_and_mapping_change_nothing(mapping, count, x64):
    # In float32 rounding alone would differ by 2e-5 after one step, and grow from there.
    difference, where = relative_difference(
        after_three_steps(mapping, count), after_three_steps('shard_map', 1)
    )
    assert difference < 1e-9, where


@pytest.mark.parametrize('mapping', ['shard_map', 'pmap'])
def test_a_run_traces_its_step_once(mapping):
    config = tiny_config(batch_size=BATCH)
    devices = parallel.Devices.take(mapping, 2)
    cohort = tiny_cohort(config, parallel.DATA)

    @chex.assert_max_traces(n=1)
    def update(state, images, labels):
        return step_lib.update(cohort, state, images, labels, jax.random.key(0))

    chex.clear_trace_counter()
    mapped = devices.map(update, (WHOLE, SPLIT, SPLIT), donate=(0,))
    state = devices.replicate(initial_state(config))
    for step in range(3):
        batch = (devices.split(part) for part in random_batch(BATCH, seed=step))
        state, _ = mapped(state, *batch)
    assert int(state.step) == 3
    larger = [devices.split(part) for part in random_batch(2 * BATCH)]
    with pytest.raises(AssertionError, match='traced > 1 times'):
        mapped(state, *larger)


def test_the_compiled_step_reuses_the_memory_of_its_state():
    config = tiny_config(method='vanilla', batch_size=BATCH)
    devices = parallel.Devices.take('shard_map', 1)
    state = devices.replicate(initial_state(config))
    batch = (devices.split(part) for part in random_batch(BATCH))
    mapped_update(config, devices, donate=(0,))(state, *batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.networks))


def test_a_batch_that_does_not_divide_is_refused():
    devices = parallel.Devices.take('shard_map', 8)
    devices.check_divides('batch_size', 64)
    with pytest.raises(UserError, match=r'config\.batch_size: .* multiple of 8.* 60.*nearest: 64'):
        devices.check_divides('batch_size', 60)
