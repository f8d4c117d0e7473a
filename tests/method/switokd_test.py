"""SwitOKD: the gate against NumPy, and what a paused network keeps."""

import functools

import jax
import numpy as np
import pytest
from conftest import (
    initial_state,
    mapped_update,
    random_batch,
    relative_difference,
    softmax,
    take_devices,
    tiny_cohort,
    tiny_config,
)

from afkd_jax.errors import UserError
from afkd_jax.method import losses


def plain(teacher, student, labels):
    """Returns (G, t, s, whether the teacher pauses), of logits [B, C]."""
    p_t, p_s, y = softmax(teacher), softmax(student), np.eye(teacher.shape[-1])[labels]
    gap, t, s = (np.abs(a - b).sum(1).mean() for a, b in ((p_s, p_t), (p_t, y), (p_s, y)))
    return gap, t, s, bool(gap > s - np.exp(-t / (s + t)) * t and t < s)


def test_the_gate_equals_numpy(x64):
    rng, seen = np.random.default_rng(0), set()
    for scale in (0.1, 1.0, 3.0, 10.0):
        for _ in range(10):
            labels = rng.integers(0, 5, 6)
            teacher, student = scale * rng.standard_normal((2, 6, 5))
            teacher += rng.uniform(0, scale) * np.eye(5)[labels]
            gap, t, s, pauses = plain(teacher, student, labels)
            np.testing.assert_allclose(losses.l1_to_labels(teacher, labels).mean(), t, rtol=1e-9)
            np.testing.assert_allclose(losses.l1_to_teacher(teacher, student).mean(), gap)
            assert bool(losses.switches(gap, t, s)) == pauses
            seen.add((pauses, bool(t < s)))
    assert seen == {(True, True), (False, True), (False, False)}


@functools.cache
def stepped(method, pausing, count=1):
    """Returns (state before, after, values) of a step of a pair that are sure of themselves.

    Where `pausing`, the first network is right for more images than the second.
    """
    config = tiny_config(method=method, batch_size=8)
    state, (images, _) = initial_state(config), random_batch(8)
    sharp = [
        network.replace(params=network.params | {'head': jax.tree.map(
            lambda leaf: 200 * leaf, network.params['head']
        )})
        for network in state.networks
    ]  # fmt: skip
    state = state.replace(networks=tuple(sharp))
    cohort = tiny_cohort(config)
    first, second = (
        np.asarray(module.apply(own.variables(), images, True, mutable=['batch_stats'])[0][0])
        for module, own in zip(cohort.networks, state.networks, strict=True)
    )
    labels = (first if pausing else second).argmax(1).astype(np.int32)
    labels[6:] = (labels[6:] + 1) % 10
    assert plain(first, second, labels)[-1] == pausing
    devices = take_devices(count)
    batch = devices.split(images), devices.split(labels)
    after, values = mapped_update(config, devices)(devices.replicate(state), *batch)
    return state, *jax.device_get((after, values))


@pytest.mark.parametrize('count', [1, 4])
def test_a_paused_teacher_keeps_parameters_and_momentum(count):
    before, after, values = stepped('switokd', True, count)
    _, dml, _ = stepped('dml', True)
    assert values['paused'].tolist() == [1, 0]
    old, new = before.networks[0], after.networks[0]
    assert relative_difference((new.params, new.opt), (old.params, old.opt))[0] == 0
    # Its statistics are those of the pass, and the student learns as in DML.
    assert relative_difference(new.batch_stats, old.batch_stats)[0] > 0
    assert relative_difference(new.batch_stats, dml.networks[0].batch_stats)[0] < 1e-6
    assert relative_difference(after.networks[1], dml.networks[1])[0] < (1e-12, 1e-4)[count > 1]


def test_else_it_is_dml_to_the_bit():
    _, after, values = stepped('switokd', False)
    _, dml, _ = stepped('dml', False)
    assert values['paused'].tolist() == [0, 0]
    assert relative_difference(after.networks, dml.networks)[0] == 0


def test_it_needs_a_pair():
    with pytest.raises(UserError, match=r'config\.networks: must be two, teacher and student'):
        tiny_cohort(tiny_config(('tiny-8-2',) * 3, method='switokd'))
