"""Discriminator and transfer layer."""

import jax
import numpy as np
import pytest
from conftest import tiny_cohort, tiny_config

from afkd_jax.devices.arrays import scalar_count
from afkd_jax.method import adversary
from afkd_jax.method import state as state_lib
from afkd_jax.models import layers

LAYERS = layers.layers(None)


def discriminated(maps):
    """Returns the parameters of a discriminator, and its outputs on the maps."""
    module = adversary.Discriminator(LAYERS)
    params = module.init(jax.random.key(0), maps)['params']
    return params, module.apply({'params': params}, maps, mutable=['batch_stats'])[0]


@pytest.mark.parametrize('size', [2, 3, 7, 8])
def test_one_number_in_0_1_per_map(size):
    maps = np.random.default_rng(0).standard_normal((5, size, size, 4)).astype(np.float32)
    params, d_B = discriminated(maps * 10)
    assert d_B.shape == (5,)
    assert 0 < d_B.min() < d_B.max() < 1
    rest = (size + 1) // 2  # 3x3, stride 2, padding 1
    # conv 9 c^2, norm 2 c, conv over the rest to one channel with bias
    assert scalar_count(params) == 9 * 16 + 8 + rest * rest * 4 + 1


def test_discriminator_equals_numpy(x64):
    rng = np.random.default_rng(1)
    maps = rng.standard_normal((3, 4, 4, 2))
    params, d_B = discriminated(maps)
    # The first convolution: at (i, j) the 3x3 window of the padded map at (2 i, 2 j).
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(params['Conv_0']['kernel'])
    x = np.zeros((3, 2, 2, 2))
    for i in range(2):
        for j in range(2):
            window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            x[:, i, j] = np.einsum('bhwc,hwcd->bd', window, kernel)
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    x = np.where(x > 0, x, 0.2 * x)
    last = params['Conv_1']
    z = np.einsum('bhwc,hwcd->bd', x, np.asarray(last['kernel'])) + np.asarray(last['bias'])
    np.testing.assert_allclose(d_B, 1 / (1 + np.exp(-z[:, 0])), rtol=1e-6)


def plain_pool(maps, shape):
    """Returns each cell as the mean of the rows and columns that it covers, even in part."""
    (height, width), (h, w) = maps.shape[1:3], shape
    result = np.zeros((len(maps), h, w, maps.shape[-1]))
    for i in range(h):
        rows = slice(int(np.floor(i * height / h)), int(np.ceil((i + 1) * height / h)))
        for j in range(w):
            columns = slice(int(np.floor(j * width / w)), int(np.ceil((j + 1) * width / w)))
            result[:, i, j] = maps[:, rows, columns].mean((1, 2))
    return result


@pytest.mark.parametrize('shape', [(8, 6), (4, 3), (4, 6), (7, 4), (3, 5), (1, 1)])
def test_average_pool_equals_numpy(shape, x64):
    maps = np.random.default_rng(3).standard_normal((2, 8, 6, 5))
    np.testing.assert_allclose(adversary.average_pool(maps, shape), plain_pool(maps, shape))


@pytest.mark.parametrize('size', [(4, 5), (2, 5), (3, 2)])
def test_transfer_equals_numpy(size, x64):
    rng = np.random.default_rng(2)
    maps = rng.standard_normal((3, 4, 5, 2))
    module = adversary.Transfer((*size, 6), LAYERS)
    variables = module.init(jax.random.key(0), maps, False)
    mapped, _ = module.apply(variables, maps, True, mutable=['batch_stats'])
    kernel = np.asarray(variables['params']['Conv_0']['kernel'])[0, 0]
    x = plain_pool(maps, size) @ kernel
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(mapped, np.maximum(x, 0), rtol=1e-6, atol=1e-9)


def test_a_transfer_that_only_pools_has_no_parameters():
    maps = np.random.default_rng(2).standard_normal((3, 8, 8, 2)).astype(np.float32)
    module = adversary.Transfer((4, 4, 2), LAYERS)
    mapped, variables = module.init_with_output(jax.random.key(0), maps, False)
    assert variables == {}
    np.testing.assert_allclose(mapped, plain_pool(maps, (4, 4)), rtol=1e-5)


def test_a_discriminator_has_no_running_statistics():
    state = state_lib.abstract(tiny_cohort(tiny_config()))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    discriminators = [path for path in paths if path.startswith('.discriminators')]
    assert any('BatchNorm_0' in path for path in discriminators)
    assert not [path for path in discriminators if 'stats' in path or 'mean' in path]
    assert [path for path in paths if 'batch_stats' in path]
