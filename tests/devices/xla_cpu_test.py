"""Workarounds for the CPU's compiler."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    mapped_update,
    random_batch,
    take_devices,
    tiny_cohort,
    tiny_config,
)

from afkd_jax.devices import xla_cpu
from afkd_jax.devices.mesh import REPLICATED
from afkd_jax.method import state as state_lib
from afkd_jax.models import layers


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64'])
def test_computed_once_changes_no_bit_of_values_and_gradients(x64, dtype):
    values = [0.0, -0.0, 1e-42, -3.3, 3.4e38, np.inf, -np.inf, np.nan]
    x = jnp.asarray(values, dtype)

    def bits(x):  # a subnormal number may become zero, as in every operation of this compiler
        return np.delete(np.asarray(x), 2).tobytes()

    y, pull = jax.vjp(jax.jit(xla_cpu.computed_once), x)
    assert y.dtype == x.dtype
    assert bits(y) == bits(x)
    assert bits(pull(x)[0]) == bits(x)
    assert bits(xla_cpu.computed_once(x)) == bits(x)


def test_computed_once_can_be_vmapped_and_differentiated_twice():
    x = jnp.arange(6.0).reshape(2, 3)

    def cube(x):
        return xla_cpu.computed_once(x) ** 3

    np.testing.assert_array_equal(jax.vmap(cube)(x), x**3)
    np.testing.assert_array_equal(jax.vmap(cube, 1, 1)(x), x**3)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(jax.grad(jax.grad(cube))))(x), 6 * x)


def lowered(platform, networks=('resnet8', 'wrn-10-1'), method='vanilla'):
    config = tiny_config(networks, method=method)
    devices = take_devices(1)
    arguments = state_lib.abstract(tiny_cohort(config)), *random_batch(8)
    jax.clear_caches()  # traced anew each time, the networks too
    step = mapped_update.__wrapped__(config, devices)
    return step.trace(*arguments).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize('platform', [pytest.param('tpu', marks=pytest.mark.slow), 'cuda'])
def test_programs_for_other_platforms_contain_no_workaround(monkeypatch, request, platform):
    networks = 'resnet8', 'mobilenet_v2x0.5'
    program = lowered(platform, networks).as_text()
    assert re.search(r'feature_group_count = \d\d', program)
    monkeypatch.setattr(xla_cpu, 'computed_once', lambda x: x)
    plain = functools.partial(layers.conv, conv_general_dilated=jax.lax.conv_general_dilated)
    monkeypatch.setattr(layers, 'conv', plain)
    layers.layers.cache_clear()
    request.addfinalizer(layers.layers.cache_clear)
    assert program == lowered(platform, networks).as_text()
    assert xla_cpu.options(platform) is None


def test_no_activation_is_computed_twice_on_a_cpu():
    step = lowered('cpu', method='afd')
    # Activations, and the gradients to them: divisions of arrays [8, height, width, channels].
    wanted = re.findall(r'stablehlo\.divide .*tensor<8x\d+x\d+x\d\d+xf32>', step.as_text())
    assert len(wanted) > 40
    text = step.compile().as_text()
    found = re.findall(r'= f32\[8,\d+,\d+,\d\d+\]\S* divide\(', text)
    assert 0.9 * len(wanted) < len(found) <= len(wanted)  # equal ones may have become one


def test_the_mapped_step_is_compiled_with_the_options(monkeypatch):
    devices = take_devices(1)
    seen = []
    monkeypatch.setattr(xla_cpu, 'options', lambda platform: seen.append(platform) or {'no': '1'})
    with pytest.raises(jax.errors.JaxRuntimeError, match='no'):
        devices.map(lambda x: x, (REPLICATED,))(jnp.zeros(3))
    assert seen == ['cpu']
