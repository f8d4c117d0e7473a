"""What XLA has compiled is kept on disk, so that a second start need not compile it again."""

import hashlib
import os
import pathlib
import platform
import re


def keep() -> None:
    """Lets JAX keep what it compiles in the user's cache, unless its variables say otherwise.

    Compiled code is of one kind of CPU, which a home directory need not be.
    """
    cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    os.environ.setdefault(
        'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(cache) / 'afkd_jax' / _kind_of_cpu())
    )


def _kind_of_cpu() -> str:
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:  # no Linux
        lines = [platform.processor()]
    # Model and instruction set; not the clock's rate.
    words = sorted({line for line in lines if re.match('model name|flags|Features|CPU ', line)})
    return f'{platform.machine()}-{hashlib.sha256(repr(words or lines).encode()).hexdigest()[:12]}'
