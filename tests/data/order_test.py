"""The order of the images."""

import numpy as np
import pytest

from afkd_jax.data import order as order_lib


@pytest.mark.parametrize(('examples', 'batch_size'), [(64, 8), (65, 8), (10, 7), (9, 9)])
def test_every_image_comes_exactly_once_in_every_epoch(examples, batch_size):
    order = order_lib.Order(3, examples, batch_size)
    steps = order.end_of(4)
    stream = np.concatenate([order.indices(step) for step in range(steps)])
    epochs = [stream[e * examples : (e + 1) * examples] for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(examples))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert 0 <= len(stream) - 4 * examples < batch_size


def test_any_batch_is_found_without_the_ones_before():
    forward, backward = order_lib.Order(0, 50, 8), order_lib.Order(0, 50, 8)
    ahead = [forward.indices(step) for step in range(20)]
    behind = [backward.indices(step) for step in reversed(range(20))][::-1]
    np.testing.assert_array_equal(ahead, behind)


def test_the_order_is_a_function_of_the_seed():
    one, two = (order_lib.Order(seed, 50, 8).indices(0).tolist() for seed in (0, 1))
    assert one != two
    assert one == order_lib.Order(0, 50, 8).indices(0).tolist()


def test_epochs_end_where_their_last_image_has_come():
    order = order_lib.Order(0, 65, 8)
    ends = [order.end_of(epoch) for epoch in range(1, 5)]
    assert ends == [9, 17, 25, 33]
    for epoch, end in enumerate(ends, start=1):
        assert int(order.epoch_at(end)) == epoch
        assert int(order.epoch_at(end - 1)) == epoch - 1


@pytest.mark.parametrize('indices', [range(10), range(3, 11), range(5, 6), range(4, 12), range(0)])
def test_padded_batches_contain_every_index_once(indices):
    seen = []
    for index, mask in order_lib.padded_batches(indices, 4):
        assert index.shape == mask.shape == (4,)
        assert index.dtype == np.int32
        assert set(index) <= set(indices)
        seen += index[mask].tolist()
    assert seen == list(indices)
