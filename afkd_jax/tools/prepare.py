"""--mode prepare: brings a data set to the disk, once, and reads a little of it."""

import time
from collections.abc import Callable
from typing import Any

from afkd_jax.command import Command
from afkd_jax.config import Config
from afkd_jax.data import dataset as dataset_lib
from afkd_jax.data import decode
from afkd_jax.errors import UserError
from afkd_jax.report.console import log, print_json


def prepare(config: Config, log: Callable[[str], None], verify: bool = False) -> dict[str, Any]:
    """Returns, as JSON, where a config's images are and how many, after preparing them.

    The first and the last image of each split, in its shuffled order, are decoded, which tests a
    directory that was copied from another machine before a run needs it.

    Args:
      log: called with a line before long work, or about the images.
      verify: decode all images instead.

    Raises:
      UserError: the set is unavailable, broken, or does not fit the config.
    """
    start = time.perf_counter()
    name, _, path = config.dataset.partition(':')
    if name == 'tfds' and path:
        from afkd_jax.data.sources import tfds

        path = tfds.prepare(config, path, log)
    dataset = dataset_lib.dataset(config)
    for line in dataset.notes:
        log(line)
    for split in ('train', *dataset.info.held_out()):
        indices = dataset.info.indices(split)
        broken, first = 0, ''
        for index in indices if verify else (indices[0], indices[-1]):
            try:
                dataset.view.evaluation(dataset[index][0], dataset.info.image_shape[2])
            except decode.DecodeError as error:
                broken, first = broken + 1, first or f'{dataset.name(index)} ({error})'
        if broken:
            raise UserError(
                f'config.dataset: {broken} of the images of {split} cannot be decoded, the first '
                f'is {first}; repair or remove them, or prepare the set anew elsewhere'
            )
    return {
        'dataset': config.dataset,
        'path': str(path) if path else None,
        **dataset.info.sizes(),
        'fingerprint': dataset.fingerprint(),
        'wall_s': time.perf_counter() - start,
    }


def main(command: Command, _: object) -> int:
    """Prints the sizes of the splits, or the facts as JSON; returns the exit code."""
    result = prepare(command.config, log, command.options.verify)
    log(
        f'{result["dataset"]}: {result["train"]:,} images to train on, {result["validation"]:,} '
        f'held out, {result["test"]:,} to test, {result["num_classes"]:,} classes'
    )
    print_json(result)
    return 0
