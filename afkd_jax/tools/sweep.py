"""--sweep of --mode benchmark: which configs it means, and the file its results are kept in."""

import csv
import itertools
import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from afkd_jax import config as config_lib
from afkd_jax.errors import UserError
from afkd_jax.method import presets as methods
from afkd_jax.training import run as run_lib

# What may vary: fields of the config, and k, how many networks.
_AXES = ('k', 'batch_size', 'dtype', 'method')


def configs(config: ConfigDict, words: str) -> list[ConfigDict]:
    """Returns the configs of a sweep, checked before the first is measured.

    Args:
      config: valid.
      words: e.g. 'k=2,4;batch_size=64,128;dtype=float32,bfloat16;method=afd,vanilla'; k networks
        of the config's first.

    Raises:
      UserError: the words are not understood, or a value is not valid.
    """
    axes = {}
    for part in words.split(';'):
        name, _, values = part.strip().partition('=')
        if name not in _AXES or not values or name in axes:
            raise UserError(
                f'--sweep: "{part.strip()}" is not understood; give each of {", ".join(_AXES)} at '
                "most once, as in 'k=2,4;batch_size=64,128;method=afd,vanilla'"
            )
        axes[name] = [value.strip() for value in values.split(',')]
        if name in ('k', 'batch_size') and not all(value.isdecimal() for value in axes[name]):
            raise UserError(f'--sweep: {name} must be whole numbers, but is {values}')
    found = []
    for values in itertools.product(*axes.values()):
        one = config.copy_and_resolve_references()
        for name, value in zip(axes, values, strict=True):
            if name == 'k':
                one.networks = (config.networks[0],) * int(value)
            else:
                one[name] = int(value) if name == 'batch_size' else value
        config_lib.validate(one)
        methods.named(one.method)
        run_lib.devices_of(one)
        found.append(one)
    return found


def append(result: dict[str, Any], path: pathlib.Path) -> None:
    """Appends a result to a CSV file, whose first line names the columns.

    A file with other columns, as of another version, is set aside under a name of its own.
    """
    row = {
        name: value if isinstance(value, (str, int, float)) else json.dumps(value)
        for name, value in result.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    there = None
    if path.exists():
        with path.open(newline='') as file:
            there = next(csv.reader(file), None)
        if there not in (None, list(row)):
            names = (path.with_name(f'{path.stem}-{n}{path.suffix}') for n in itertools.count(1))
            path.rename(next(name for name in names if not name.exists()))
            there = None
    with path.open('a', newline='') as file:
        out = csv.DictWriter(file, list(row))
        if there is None:
            out.writeheader()
        out.writerow(row)
