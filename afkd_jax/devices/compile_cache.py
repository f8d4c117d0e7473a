"""The persistent compilation cache: a second start loads what the first has compiled."""

import hashlib
import os
import pathlib
import platform
import re
import sys


def enable() -> None:
    """Uses ~/.cache/afkd_jax/<CPU>, unless JAX_COMPILATION_CACHE_DIR names another directory.

    One directory per kind of CPU, because machines that share a home directory may differ.
    """
    cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    directory = str(pathlib.Path(cache) / 'afkd_jax' / _cpu_kind())
    directory = os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', directory)
    if 'jax' in sys.modules:  # a config file has imported it, so the variable comes too late
        sys.modules['jax'].config.update('jax_compilation_cache_dir', directory)


def _cpu_kind() -> str:
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    # Model and instruction set; not the clock rate.
    words = sorted({line for line in lines if re.match('model name|flags|Features|CPU ', line)})
    return f'{platform.machine()}-{hashlib.sha256(repr(words or lines).encode()).hexdigest()[:12]}'
