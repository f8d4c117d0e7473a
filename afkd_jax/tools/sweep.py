"""--sweep of --mode benchmark: its configs, and the CSV file of its results."""

import csv
import itertools
import json
import pathlib
from typing import Any

from afkd_jax.config import Config
from afkd_jax.devices import mesh
from afkd_jax.errors import UserError
from afkd_jax.method import presets

# Fields of the config that a sweep may vary, and k, the number of networks.
_AXES = ('k', 'batch_size', 'dtype', 'method')


def configs(config: Config, words: str) -> list[Config]:
    """Returns the configs of a sweep, checked before the first is measured.

    Args:
      config: checked.
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
        fields: dict[str, Any] = dict(zip(axes, values, strict=True))
        if 'k' in fields:
            fields['networks'] = (config.networks[0],) * int(fields.pop('k'))
            fields |= {'init_from': (), 'frozen': ()}
        if 'batch_size' in fields:
            fields['batch_size'] = int(fields['batch_size'])
        one = config.replace(**fields)
        presets.named(one.method)
        mesh.devices_of(one)
        found.append(one)
    return found


def append(result: dict[str, Any], path: pathlib.Path) -> None:
    """Appends a result to a CSV file, whose first line names the columns.

    A file with other columns, as of another version, is renamed.
    """
    row = {
        name: value if isinstance(value, (str, int, float)) else json.dumps(value)
        for name, value in result.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    there = None
    if path.exists():
        with path.open(newline='', encoding='utf-8') as file:
            there = next(csv.reader(file), None)
        if there not in (None, list(row)):
            names = (path.with_name(f'{path.stem}-{n}{path.suffix}') for n in itertools.count(1))
            path.rename(next(name for name in names if not name.exists()))
            there = None
    with path.open('a', newline='', encoding='utf-8') as file:
        out = csv.DictWriter(file, list(row))
        if there is None:
            out.writeheader()
        out.writerow(row)
