"""Environment variables of JAX that change a run."""

import os

import pytest

from afkd_jax.devices import environment
from afkd_jax.errors import UserError


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('JAX_DEFAULT_PRNG_IMPL', 'rbg'),
        ('JAX_ENABLE_X64', '1'),
        ('JAX_ENABLE_X64', 'perhaps'),
        ('JAX_THREEFRY_PARTITIONABLE', '0'),
        ('JAX_DISABLE_JIT', 'True'),
        ('JAX_NUMPY_DTYPE_PROMOTION', 'strict'),
        ('JAX_TRANSFER_GUARD', 'disallow'),
        ('JAX_NUM_CPU_DEVICES', '0'),
    ],
)
def test_what_changes_a_run_is_rejected(name, value, monkeypatch):
    environment.check()
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name}: .*'{value}'.*; unset it"):
        environment.check()


def test_what_does_not_change_a_run_is_accepted(monkeypatch):
    for name, value in (('ENABLE_X64', 'False'), ('DEFAULT_PRNG_IMPL', 'threefry2x32')):
        monkeypatch.setenv(f'JAX_{name}', value)
    monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '4')
    environment.check()


@pytest.mark.parametrize(
    ('value', 'words'),
    [
        ('--xla_foo=1', '--xla_foo=1'),
        ('--xla_cpu_enable_fast_math=maybe', 'value maybe for flag xla_cpu_enable_fast_math'),
        ('nowhere', '"nowhere"'),
    ],
)
def test_flags_at_which_xla_aborts_are_rejected(value, words, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=2')
    environment.check()
    monkeypatch.setenv('XLA_FLAGS', value)
    with pytest.raises(UserError, match=f'^XLA_FLAGS: .*{words}.*; correct or unset it$'):
        environment.check()


def test_what_changes_the_rounding_is_recorded(monkeypatch):
    assert environment.rounding()['usable cores'] == str(len(os.sched_getaffinity(0)))
    monkeypatch.setenv('JAX_DEFAULT_MATMUL_PRECISION', 'highest')
    assert environment.rounding()['JAX_DEFAULT_MATMUL_PRECISION'] == 'highest'
