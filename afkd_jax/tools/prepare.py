"""--mode prepare: brings a set to the disk, once, and reads a little of it."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from afkd_jax.data import dataset as sources
from afkd_jax.data import decode
from afkd_jax.errors import UserError


def prepare(config: ConfigDict, tell: Callable[[str], None]) -> dict[str, Any]:
    """Returns where a config's images are and how many, as JSON, once they are there.

    The first and the last image of each split, in its shuffled order, are decoded: so a directory
    that was copied from another machine is tried before a run needs it.

    Args:
      config: valid.
      tell: is given a line where one waits.

    Raises:
      UserError: the set cannot be had, is broken, or does not fit the config.
    """
    begin, path = time.perf_counter(), None
    kind, _, name = config.dataset.partition(':')
    if kind == 'tfds':
        from afkd_jax.data.sources import tfds as tfds_source

        path = tfds_source.prepare(config, name, tell)
    elif kind != 'digits':
        path = name
    dataset = sources.dataset(config)
    for split in ('train', *dataset.info.held_out()):
        places = dataset.info.places(split)
        for place in (places[0], places[-1]):
            try:
                dataset.view.evaluation(dataset[place][0], dataset.info.image_shape[2])
            except decode.Broken as error:
                raise UserError(
                    f'config.dataset: {dataset.name(place)} cannot be decoded ({error}); mend '
                    'or remove it, or prepare the set anew elsewhere'
                ) from None
    return {
        'dataset': config.dataset,
        'path': path and str(path),
        **dataclasses.asdict(dataset.info),
        'fingerprint': dataset.fingerprint(),
        'wall_s': time.perf_counter() - begin,
    }
