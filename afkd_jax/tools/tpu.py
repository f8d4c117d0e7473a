"""TPU names -> devices for ahead-of-time compilation; no TPU need be attached."""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from afkd_jax.errors import UserError

# Chips -> layout, as each generation arranges them.
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
        f'layout, as v5e:4x4; generations: {", ".join(_GENERATIONS)}; or GPUs, as h100-8'
    )


def devices(name: str) -> Sequence[Any]:
    """Returns the devices of a TPU for ahead-of-time compilation.

    Raises:
      UserError: there is no such TPU, or its compiler is not installed.
    """
    generation, layout = layout_of(name)
    # Otherwise libtpu first queries the machine's metadata server, and waits.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    # No chip is used, so another process may use one.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    options: dict[str, Any] = {}
    if math.prod(map(int, layout.split('x'))) == 1:
        options['chips_per_host_bounds'] = (1, 1, 1)
    if generation == 'v4':  # in use, both cores of a chip are one device
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
        raise UserError(f'--topology: {name} is unavailable ({words[:300]})') from error
    return description.devices


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hides the output of the compiler's loader, which reports the missing TPU."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
