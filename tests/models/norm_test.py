"""Batch normalization against Flax's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import take_devices

from afkd_jax.devices.mesh import BATCH_SHARDED, REPLICATED
from afkd_jax.devices.spmd import DATA, varying
from afkd_jax.models.norm import BatchNorm


def variables(channels, dtype=None):
    rng = np.random.default_rng(1)
    draw = [jnp.asarray(rng.uniform(0.5, 2, channels), dtype) for _ in range(4)]
    return {
        'params': {'scale': draw[0], 'bias': draw[1]},
        'batch_stats': {'mean': draw[2], 'var': draw[3]},
    }


def both(**settings):
    settings = {'momentum': 0.9, 'epsilon': 1e-5, 'axis_name': None, 'dtype': None} | settings
    return BatchNorm(**settings), nn.BatchNorm(**settings)


def outputs(module, given, x, train):
    """Returns (y, new statistics, gradients to parameters and x)."""

    def apply(params, x):
        return module.apply({**given, 'params': params}, x, mutable=['batch_stats'])

    y, pull, new = jax.vjp(apply, given['params'], x, has_aux=True)
    return y, new if train else {}, pull(jnp.cos(y))


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('shape', [(4, 3, 5, 6), (8, 6)])
def test_values_statistics_and_gradients_are_those_of_flax(x64, shape, train):
    x, given = 3 + 2 * np.random.default_rng(0).normal(size=shape), variables(6)
    mine, theirs = (
        outputs(module, given, jnp.asarray(x), train)
        for module in both(use_running_average=not train)
    )
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), mine, theirs
    )


@pytest.mark.parametrize(
    'settings',
    [
        {'use_scale': False},
        {'use_bias': False},
        {'use_scale': False, 'use_bias': False},
        {'scale_init': nn.initializers.zeros, 'bias_init': nn.initializers.ones},
        {'axis': 1},
        {'use_fast_variance': False},
        {'param_dtype': 'float64'},
    ],
)
def test_the_options_are_those_of_flax(x64, settings):
    x = jnp.asarray(3 + np.random.default_rng(0).normal(size=(4, 3, 5, 6)))
    results = []
    for module in both(use_running_average=None, **settings):
        given = module.init(jax.random.key(0), x, use_running_average=False)
        y, new = module.apply(given, x, use_running_average=False, mutable=['batch_stats'])
        results.append((given, y, new, module.apply(given | new, x, use_running_average=True)))
    mine, theirs = results
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12), *results)


def test_masked_statistics_are_those_of_flax(x64):
    x, mask = jnp.arange(24.0).reshape(4, 6), jnp.arange(24).reshape(4, 6) % 3 > 0
    mine, theirs = (
        module.apply(variables(6), x, mask=mask, mutable=['batch_stats'])
        for module in both(use_running_average=False)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11), mine, theirs)


@pytest.mark.parametrize('double', [False, True])
def test_initial_variables_are_those_of_flax(double):
    """In single precision, also where JAX_ENABLE_X64 is set."""
    modules = both(use_running_average=False)
    with jax.enable_x64(double):
        x = jnp.ones((2, 3, 3, 4), 'float32')
        mine, theirs = (module.init(jax.random.key(0), x) for module in modules)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), mine, theirs)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_rounding_is_no_worse_than_that_of_flax(x64, dtype):
    """With channels whose mean is up to 30 times their deviation; against double precision."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 8, 8, 16)) + np.linspace(-30, 30, 16)).astype('float32')
    module, flax = both(use_running_average=False, dtype=None if dtype == 'float32' else dtype)
    exact_module, _ = both(use_running_average=False)
    exact = outputs(exact_module, variables(16, 'float64'), jnp.asarray(x, 'float64'), True)

    def error(module):
        found = outputs(module, variables(16, 'float32'), jnp.asarray(x), True)
        assert found[0].dtype == dtype
        return jax.tree.map(
            lambda a, b: float(jnp.linalg.norm(a.astype(b.dtype) - b) / jnp.linalg.norm(b)),
            found,
            exact,
        )

    errors = jax.tree.leaves(error(module)), jax.tree.leaves(error(flax))
    for mine, theirs in zip(*errors, strict=True):
        assert mine < 1.5 * theirs + 1e-6


def test_statistics_and_gradients_are_over_all_devices(x64):
    devices, given = take_devices(4), variables(3)
    x = jnp.asarray(1 + np.random.default_rng(0).normal(size=(8, 2, 2, 3)))
    alone, _ = both(use_running_average=False)
    sharded, _ = both(use_running_average=False, axis_name=DATA)

    def step(given, x):
        y, stats, (to_params, to_x) = outputs(sharded, varying(given), x, True)
        return y, jax.lax.pmean(stats, DATA), jax.lax.psum(to_params, DATA), to_x

    specs = BATCH_SHARDED, REPLICATED, REPLICATED, BATCH_SHARDED
    found = devices.map(step, (REPLICATED, BATCH_SHARDED), specs)(given, x)
    y, stats, (to_params, to_x) = outputs(alone, given, x, True)
    wanted = y, stats, to_params, to_x
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11), found, wanted)
