"""--mode predict: classes and probabilities of image files, as CSV."""

import collections
import csv
import io
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import rich.progress

from afkd_jax.checkpoints.files import write_atomic
from afkd_jax.command import Command, number_or
from afkd_jax.data.sources.folder import ENDINGS
from afkd_jax.errors import UserError
from afkd_jax.report.console import console, log
from afkd_jax.tools.model import Model, load

_BATCH, _TOP = 64, 5


def image_files(names: Sequence[str]) -> list[pathlib.Path]:
    """Returns files as they are, and the images at any depth of directories, in order.

    Raises:
      UserError: there is no such file or directory, or no image.
    """
    found = []
    for name in names:
        path = pathlib.Path(name)
        if path.is_dir():
            inside = [
                pathlib.Path(where) / file
                for where, _, files in os.walk(path)
                for file in files
                if os.fsencode(file).lower().endswith(ENDINGS) and not file.startswith('.')
            ]
            found += sorted(inside)
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f'--images: there is no file or directory {path}')
    if not found:
        raise UserError(f'--images: there is no image in {", ".join(names) or "nothing"}')
    return found


def predictions(model: Model, files: Sequence[pathlib.Path]) -> Iterator[tuple[pathlib.Path, Any]]:
    """Yields (file, probabilities [C], or a UserError where the file cannot be read)."""
    for start in range(0, len(files), _BATCH):
        results: dict[pathlib.Path, Any] = {}
        for path in files[start : start + _BATCH]:
            try:
                results[path] = model.read(path)
            except UserError as error:
                results[path] = error
        images = {path: one for path, one in results.items() if isinstance(one, np.ndarray)}
        if images:
            results |= zip(images, model.predict(np.stack(list(images.values()))), strict=True)
        yield from results.items()


def _row(path: pathlib.Path, classes: Sequence[str], probabilities: np.ndarray) -> list[Any]:
    best = np.argsort(-probabilities, kind='stable')[:_TOP]
    return [str(path), *(v for k in best for v in (classes[k], f'{probabilities[k]:.6f}'))]


def main(command: Command, _: object) -> int:
    """Writes the CSV, prints a summary, and as JSON last; returns the exit code."""
    options = command.options
    network = number_or(options.network, 'network', 1, 'ensemble') or 1
    step = number_or(options.step, 'step', 0, 'last', 'best') or 'last'
    files = image_files(options.images)
    model = load(command.workdir, network, step if step is not None else 'last')
    output = pathlib.Path(options.output or command.workdir / 'predictions.csv')
    rows, unreadable, labelled, correct = [], 0, 0, 0
    counts: collections.Counter[str] = collections.Counter()
    bar: dict[str, Any] = {'console': console, 'disable': not console.is_terminal}
    tracked = rich.progress.track(predictions(model, files), 'predict', len(files), **bar)
    for path, result in tracked:
        if isinstance(result, UserError):
            unreadable += 1
            log(f'warning: {result}')
            continue
        rows.append(_row(path, model.classes, result))
        counts[rows[-1][1]] += 1
        if path.parent.name in model.classes:
            labelled += 1
            correct += path.parent.name == rows[-1][1]
    top = range(1, min(_TOP, len(model.classes)) + 1)
    names = [f'{name}{"" if k == 1 else f"_{k}"}' for k in top for name in ('class', 'probability')]
    _write_csv(output, ['file', *names], rows)
    accuracy = 100 * correct / labelled if labelled else None
    log(f'{model.name} of step {model.step}: {len(rows)} images; written to {output}')
    if unreadable:
        log(f'{unreadable} files could not be read as images; they are named above')
    if accuracy is not None:
        log(f'{labelled} images lie in a folder of a class name: {accuracy:.2f} % are predicted so')
    print(
        json.dumps(
            {
                'network': model.name,
                'step': model.step,
                'images': len(rows),
                'unreadable': unreadable,
                'labelled': labelled,
                'accuracy': accuracy,
                'output': str(output),
                'classes': dict(counts),
            }
        )
    )
    return 0


def _write_csv(path: pathlib.Path, names: list[str], rows: list[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([names, *rows])
    write_atomic(path, text.getvalue().encode(errors='backslashreplace'))
