"""The persistent compilation cache: a second start loads what the first has compiled."""

import hashlib
import os
import pathlib
import platform
import re
import sys


def enable() -> str | None:
    """Uses ~/.cache/afkd_jax/<CPU>, unless JAX_COMPILATION_CACHE_DIR names another directory.

    One directory per kind of CPU, because machines that share a home directory may differ.

    Returns:
      A warning if there can be no cache, as without a home directory; else None.
    """
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        try:
            cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
            folder = pathlib.Path(cache) / 'afkd_jax' / _cpu_kind()
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f'{folder} cannot be written')
        except (OSError, RuntimeError) as error:  # the latter where no home directory is known
            return (
                f'warning: compiled programs are not cached ({error}); name a directory by '
                'JAX_COMPILATION_CACHE_DIR'
            )
        os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
    directory = os.environ['JAX_COMPILATION_CACHE_DIR']
    if 'jax' in sys.modules:  # a config file has imported it, so the variable comes too late
        sys.modules['jax'].config.update('jax_compilation_cache_dir', directory)
    return None


def _cpu_kind() -> str:
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    # Model and instruction set; not the clock rate.
    words = sorted({line for line in lines if re.match('model name|flags|Features|CPU ', line)})
    return f'{platform.machine()}-{hashlib.sha256(repr(words or lines).encode()).hexdigest()[:12]}'
