"""TPUs by their names, as devices that need not be there; and how much memory a device has."""

import contextlib
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from afkd_jax.errors import UserError

# Memory of one device in bytes, where the runtime does not tell: a chip of v4 on, a core before.
_MEMORY = {
    'TPU v2': 8 * 2**30,
    'TPU v3': 16 * 2**30,
    'TPU v4': 32 * 2**30,
    'TPU v5 lite': 16 * 2**30,
    'TPU v5': 95 * 2**30,
    'TPU v6 lite': 32 * 2**30,
}
# Chips -> their layout, as the generations arrange them.
_FLAT = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
_CUBES = {
    4: '2x2x1',
    8: '2x2x2',
    16: '2x2x4',
    32: '2x4x4',
    64: '4x4x4',
    128: '4x4x8',
    256: '4x8x8',
    512: '8x8x8',
}
_SQUARES = {4: '2x2', 16: '4x4', 64: '8x8', 256: '16x16'}
# Generation -> (cores that its names count per chip, layouts).
_GENERATIONS = {
    'v2': (2, _SQUARES),
    'v3': (2, _SQUARES),
    'v4': (2, _CUBES),
    'v5e': (1, _FLAT),
    'v5litepod': (1, _FLAT),
    'v5p': (2, _CUBES),
    'v6e': (1, _FLAT),
}


def layout_of(name: str) -> tuple[str, str]:
    """Returns (generation, layout) of a TPU's name: 'v5e-16' -> ('v5e', '4x4').

    A name with a colon, such as 'v5e:4x4', has both already.

    Raises:
      UserError: there is no such TPU.
    """
    if match := re.fullmatch(r'(v\w+):(\d+(?:x\d+)+)', name):
        generation, layout = match.groups()
        if generation in _GENERATIONS:
            return generation.replace('v5litepod', 'v5e'), layout
    if match := re.fullmatch(r'(v\w+)-(\d+)', name):
        generation, size = match[1], int(match[2])
        if generation in _GENERATIONS:
            per_chip, layouts = _GENERATIONS[generation]
            if size % per_chip == 0 and size // per_chip in layouts:
                return generation.replace('v5litepod', 'v5e'), layouts[size // per_chip]
            sizes = ', '.join(f'{generation}-{chips * per_chip}' for chips in layouts)
            raise UserError(f'--topology: there is no {name}; there are {sizes}')
    raise UserError(
        f'--topology: {name} is not known; name a TPU by generation and size, as v5e-16, or by its '
        f'layout, as v5e:4x4; generations: {", ".join(_GENERATIONS)}'
    )


def devices(name: str) -> Sequence[Any]:
    """Returns the devices of a TPU that need not be there.

    Raises:
      UserError: there is no such TPU, or its compiler is not installed.
    """
    generation, layout = layout_of(name)
    # It would look for the machine's own TPU first, and wait for an answer.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    # No chip is used, so it does not matter who uses one.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    options: dict[str, Any] = {}
    if math.prod(map(int, layout.split('x'))) == 1:
        options['chips_per_host_bounds'] = (1, 1, 1)
    if generation == 'v4':  # as it is used: both cores of a chip are one device
        options['chip_config_name'] = 'megacore'
    try:
        with _silent():
            description = topologies.get_topology_desc(
                platform='tpu', topology_name=f'{generation}:{layout}', **options
            )
    except Exception as error:  # whatever the compiler's loader raises
        words = ' '.join(str(error).split())
        if 'not installed' in words:
            raise UserError(
                f'--topology: {name} needs the compiler for TPUs, which is not installed: '
                f'python -m pip install "jax[tpu]=={jax.__version__}"'
            ) from error
        raise UserError(f'--topology: {name} cannot be had ({words[:300]})') from error
    return description.devices


@contextlib.contextmanager
def _silent():
    """Lets the compiler's loader print nothing: it complains of the TPU that is not there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def memory_of(device: Any) -> int | None:
    """Returns the bytes of a device's memory; None if they are not known."""
    if device.platform == 'cpu':  # all share that of the machine
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    with contextlib.suppress(Exception):  # what is not there has no statistics
        return device.memory_stats()['bytes_limit']
    return _MEMORY.get(device.device_kind)
