"""Environment variables of JAX with which a run would be another, or would not run at all."""

import os
import re
import subprocess
import sys

from afkd_jax.errors import UserError

_OFF, _ON = ('0', 'false', 'f', 'no', 'n', 'off', ''), ('1', 'true', 't', 'yes', 'y', 'on')
# Variable -> the values with which runs are what they are without it.
_ALLOWED = {
    'JAX_DEFAULT_PRNG_IMPL': ('threefry2x32',),  # others give other weights, order and dropout
    'JAX_THREEFRY_PARTITIONABLE': _ON,  # likewise
    'JAX_ENABLE_X64': _OFF,  # draws other random numbers
    'JAX_DISABLE_JIT': _OFF,  # the steps are compiled ahead of time
    'JAX_NUMPY_DTYPE_PROMOTION': ('standard',),  # optax and Flax need it
    'JAX_TRANSFER_GUARD': ('allow', 'log'),
    'JAX_TRANSFER_GUARD_HOST_TO_DEVICE': ('allow', 'log'),
    'JAX_TRANSFER_GUARD_DEVICE_TO_HOST': ('allow', 'log'),
    'JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE': ('allow', 'log'),
}


def check() -> None:
    """Rejects variables that change the bits of runs, or with which they cannot work.

    Raises:
      UserError: there is one.
    """
    for name, allowed in _ALLOWED.items():
        value = os.environ.get(name)
        if value is not None and value.lower() not in allowed:
            raise UserError(
                f'{name}: {value!r} would change the results, or stop the run; unset it'
            )
    count = os.environ.get('JAX_NUM_CPU_DEVICES', '1')
    if count != '-1' and not (count.isdecimal() and int(count)):
        raise UserError(
            f'JAX_NUM_CPU_DEVICES: must be a whole number from 1 on, but is {count!r}; unset it'
        )
    if os.environ.get('XLA_FLAGS'):
        _check_xla_flags()


def _check_xla_flags() -> None:
    """Rejects flags at which XLA would abort the process; costs 0.4 s."""
    child = subprocess.run(
        [sys.executable, '-c', 'from jaxlib import xla_client; xla_client.CompileOptions()'],
        capture_output=True, text=True, errors='replace', check=False,
    )  # fmt: skip
    # The first line of XLA's log; the help of all flags may follow.
    found = re.search(r'^[EF]\d{4} [^]]*\] (.*)', child.stderr, re.MULTILINE)
    if child.returncode and found:
        raise UserError(f'XLA_FLAGS: {found[1].rstrip(".")}; correct or unset it')


def rounding() -> dict[str, str]:
    """Returns what changes the rounding of a run besides versions and devices, by name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    precision = os.environ.get('JAX_DEFAULT_MATMUL_PRECISION', 'default')
    return {'usable cores': str(cores), 'JAX_DEFAULT_MATMUL_PRECISION': precision}
