"""--mode predict: classes and probabilities of image files, as CSV."""

import csv
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import rich.progress

from afkd_jax import paths
from afkd_jax.checkpoints import files as files_lib
from afkd_jax.command import Command, new_file
from afkd_jax.data.sources import folder
from afkd_jax.errors import UserError
from afkd_jax.report.console import console, log, print_json
from afkd_jax.tools.model import Model, load_for

_BATCH, _TOP = 64, 5


def image_files(names: Sequence[str]) -> list[pathlib.Path]:
    """Returns files as they are, and the images at any depth of directories, without hidden ones.

    Raises:
      UserError: there is no such file or directory, or no image.
    """
    found = []
    for name in names:
        path = paths.local('--images', name)
        if not name or not path.exists():
            raise UserError(f'--images: there is no file or directory {name!r}')
        inside = folder.find(os.fsencode(path)).images if path.is_dir() else []
        found += [path / os.fsdecode(file) for file in inside] if path.is_dir() else [path]
    if not found:
        where = f'there is no image in {", ".join(names)}' if names else 'name files or directories'
        raise UserError(f'--images: {where}')
    return found


def _readable(
    model: Model, files: Iterable[pathlib.Path]
) -> Iterator[tuple[pathlib.Path, np.ndarray]]:
    for path in files:
        try:
            yield path, model.read(path)
        except UserError as error:
            log(f'warning: {error}')


def predictions(
    model: Model, files: Iterable[pathlib.Path]
) -> Iterator[tuple[pathlib.Path, np.ndarray]]:
    """Yields (file, probabilities [C]) of the files that can be read; logs the others."""
    readable = _readable(model, files)
    while batch := list(itertools.islice(readable, _BATCH)):
        paths, images = zip(*batch, strict=True)
        yield from zip(paths, model.predict(np.stack(images)), strict=True)


def _row(path: pathlib.Path, classes: tuple[str, ...], probabilities: np.ndarray) -> list[str]:
    best = np.argsort(-probabilities, kind='stable')[:_TOP]
    named = [value for k in best for value in (classes[k], f'{probabilities[k]:.6f}')]
    return [str(path), *named]


def main(command: Command, _: object) -> int:
    """Writes the CSV, prints a summary, or it as JSON; returns the exit code."""
    options = command.options
    files = image_files(options.images)
    model = load_for(command)
    name = f'predictions-{model.name.replace(" ", "-")}-step{model.step}.csv'
    output = new_file(paths.local('--output', options.output or command.workdir / name))
    bar: dict[str, Any] = {'console': console, 'disable': not console.is_interactive}
    images, labelled, correct = 0, 0, 0
    with files_lib.created(output) as file:
        writer = csv.writer(file)
        top = range(1, min(_TOP, len(model.classes)) + 1)
        endings = ['' if k == 1 else f'_{k}' for k in top]
        writer.writerow(['file', *(f'{n}{e}' for e in endings for n in ('class', 'probability'))])
        tracked = rich.progress.track(files, 'predict', **bar)
        for path, probabilities in predictions(model, tracked):
            row = _row(path, model.classes, probabilities)
            writer.writerow(row)
            images += 1
            # The nearest folder with the name of a class.
            names = (folder.class_name(os.fsencode(parent.name)) for parent in path.parents)
            if label := next((one for one in names if one in model.classes), None):
                labelled += 1
                correct += label == row[1]
        if not images:
            raise UserError(f'--images: none of {len(files)} files can be read as an image')
    accuracy = 100 * correct / labelled if labelled else None
    log(f'{model.name} of step {model.step}: {images} images; written to {output}')
    if len(files) > images:
        log(f'{len(files) - images} files could not be read as images; they are named above')
    if accuracy is not None:
        log(f'{labelled} images lie in a folder of a class name: {accuracy:.2f} % are predicted so')
    facts = {'network': model.name, 'step': model.step, 'images': images}
    facts |= {'unreadable': len(files) - images, 'labelled': labelled, 'accuracy': accuracy}
    print_json(facts | {'output': str(output)})
    return 0
