"""Checkpoints: what is kept, what comes back, what is refused."""

import jax
import numpy as np
import pytest
from conftest import PAIR, initial_state, tiny_cohort, tiny_config

from afkd_jax import parallel
from afkd_jax import state as state_lib
from afkd_jax.checkpoints import Checkpoints, Progress
from afkd_jax.errors import UserError


@pytest.fixture(scope='module')
def state():
    return initial_state(tiny_config())


def replicated(count):
    return parallel.Devices.local('shard_map', count)


def test_a_state_comes_back_to_the_bit_on_any_number_of_devices(state, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    best = {'validation': 98.6013986013986, 'test': 97.5, 'step': 4}
    progress = Progress([best, None, None], [1e3, 2e3], 3.5)
    for step in (2, 4, 6):
        checkpoints.save(step, replicated(2).replicate(state), progress)
    assert checkpoints.latest == 6
    like = state_lib.abstract(tiny_cohort(tiny_config()))
    for count in (1, 2, 8):
        devices = replicated(count)
        restored, remembered = checkpoints.restore(devices.abstract(like))
        assert remembered == progress
        assert state_lib.fingerprint(restored) == state_lib.fingerprint(state)
        assert all(leaf.sharding == devices.replicated for leaf in jax.tree.leaves(restored))
    with pytest.raises(UserError, match='no checkpoint of step 2 .* there are 4, 6'):
        checkpoints.restore(replicated(1).abstract(like), 2)
    checkpoints.close()


def test_the_best_is_the_first_with_the_highest_validation_accuracy():
    progress = Progress.start(2)
    assert progress.improved([1.0, 2.0, 3.0]) == [0, 1, 2]
    progress.best = [{'validation': value} for value in (50.0, 60.0, 70.0)]
    assert progress.improved([50.0, 60.1, 69.9]) == [1]


def test_none_to_restore(state, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest is None
    with pytest.raises(UserError, match='no checkpoint here; run --mode train first'):
        checkpoints.restore(replicated(1).abstract(state))
    checkpoints.close()


@pytest.mark.parametrize(
    ('networks', 'method'), [(('tiny-8-2', 'tiny-6-2'), 'afd'), (PAIR, 'kd_ring')]
)
def test_another_cohorts_checkpoint_is_refused(networks, method, state, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state, Progress.start(2))
    like = state_lib.abstract(tiny_cohort(tiny_config(networks, method=method)))
    with pytest.raises(UserError, match='cannot be restored'):
        checkpoints.restore(replicated(1).abstract(like))
    checkpoints.close()


def test_the_fingerprint_sees_every_array_and_bit(state):
    fingerprint = state_lib.fingerprint(state)
    assert fingerprint == state_lib.fingerprint(jax.tree.map(np.copy, state))
    leaves, tree = jax.tree.flatten(state)
    for i in range(0, len(leaves), 5):
        changed = [np.array(leaf) for leaf in leaves]
        changed[i].reshape(-1).view(np.uint8)[-1] ^= 1
        assert state_lib.fingerprint(tree.unflatten(changed)) != fingerprint
