"""What a valid config is, and the numbers derived from it. Imports no JAX."""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from afkd_jax.errors import UserError, nearest
from configs import default

MAPPINGS = ('shard_map', 'pmap')
SCHEDULES = ('constant', 'steps', 'cosine')
ON_NONFINITE = ('stop', 'skip')
DTYPES = ('float32', 'bfloat16')
STATISTICS = ('global', 'local')
PLACEMENTS = ('auto', 'device', 'host', 'stream')

# What single precision holds; a smaller number would be 0 there, a larger one infinite.
_SMALLEST, _LARGEST = 1e-37, 1e38

# Fields that may differ when a run continues: what it computes does not depend on them; on mesh.*
# its rounding does, as on the number of devices. (Which images there are is checked by their
# fingerprint.)
_MAY_CHANGE = re.compile(
    r'mesh\..*|checkpoint\..*|on_nonfinite|saturation_steps|data\.(manual_dir|data_dir|workers|placement|max_corrupt)'
)


def flatten(config: ConfigDict | dict, prefix: str = '') -> dict[str, Any]:
    """Returns {'data.pad': 4, ...}: every leaf under its dotted name, in the config's order."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f'{prefix}{key}.')
        else:
            flat[prefix + key] = value
    return flat


def _positive(value):
    return value > 0


def _not_negative(value):
    return value >= 0


def _never(value):
    return False


def _is_range(most: float):
    """Returns the test of two rising numbers in (0, most]."""
    return lambda v: len(v) == 2 and all(_is(x, float) for x in v) and 0 < v[0] <= v[1] <= most


def _per_channel(least: float):
    """Returns the test of no number, or one per channel in [least, 1]."""
    return lambda v: len(v) in (0, 1, 3) and all(_is(x, float) and least <= x <= 1 for x in v)


def _is_optimizer(name: str) -> dict:
    """Returns the rules of the optimizer section `name`."""
    return {
        f'{name}.learning_rate': (_positive, 'above 0'),
        f'{name}.weight_decay': (_not_negative, 'at least 0'),
        f'{name}.schedule': (lambda v: v in SCHEDULES, f'one of {", ".join(SCHEDULES)}'),
        f'{name}.boundaries': (
            lambda v: all(_is(x, float) and 0 < x < 1 for x in v) and list(v) == sorted(set(v)),
            'a tuple of rising fractions of the run, each between 0 and 1, as in "(0.5,0.75)"',
        ),
        f'{name}.factor': (_positive, 'above 0'),
    }


# Every field of the schema: its test, and the words that finish "must be ...".
RULES = {
    'networks': (
        lambda v: len(v) >= 2 and all(isinstance(x, str) and x for x in v),
        'a tuple of at least two network names (one has nobody to learn from), none empty, '
        "each quoted, as in \"('resnet8','resnet20')\"",
    ),
    'ring_order': (
        lambda v: all(_is(x, int) for x in v),
        'a tuple of whole numbers, one per network, or () for the order of config.networks',
    ),
    'method': (bool, 'the name of a method'),
    # Its square, and one over it, are factors in single precision.
    'loss.temperature': (lambda v: 0.01 <= v <= 1000, 'in [0.01, 1000]'),
    'loss.kl_weight': (_not_negative, 'at least 0'),
    'loss.kl_ramp_up': (lambda v: 0 <= v <= 1, 'a fraction of the run, in [0, 1]'),
    'loss.l1_weight': (_not_negative, 'at least 0'),
    'loss.adversarial_weight': (_not_negative, 'at least 0'),
    'loss.label_smoothing': (lambda v: 0 <= v < 1, 'in [0, 1)'),
    'epochs': (_positive, 'at least 1'),
    'batch_size': (_positive, 'at least 1'),
    'eval_batch_size': (lambda v: 1 <= v <= 2**16, 'in 1 .. 65536'),
    'seed': (lambda v: 0 <= v < 2**32, 'in 0 .. 4294967295'),
    'mapping': (lambda v: v in MAPPINGS, f'one of {", ".join(MAPPINGS)}'),
    'mesh.peer': (_positive, 'at least 1'),
    'mesh.data': (_not_negative, 'at least 0 (0: all devices)'),
    'dtype': (lambda v: v in DTYPES, f'one of {", ".join(DTYPES)}'),
    'batch_statistics': (lambda v: v in STATISTICS, f'one of {", ".join(STATISTICS)}'),
    'dataset': (
        lambda v: re.fullmatch(r'digits|(idx|folder|tfds):.+', v),
        'digits, idx:DIR, folder:DIR or tfds:NAME (e.g. tfds:cifar10)',
    ),
    'data.train_examples': (_not_negative, 'at least 0 (0: all)'),
    'data.validation_fraction': (lambda v: 0 <= v < 1, 'in [0, 1)'),
    'data.placement': (lambda v: v in PLACEMENTS, f'one of {", ".join(PLACEMENTS)}'),
    'data.image_size': (_not_negative, 'at least 0 (0: as stored)'),
    'data.crop_scale': (_is_range(1), 'two rising numbers above 0, at most 1, as in "(0.08,1.0)"'),
    'data.crop_ratio': (_is_range(100), 'two rising numbers above 0, as in "(0.75,1.33)"'),
    'data.eval_resize': (_positive, 'at least 1'),
    'data.pad': (_not_negative, 'at least 0'),
    'data.flip': (lambda v: True, ''),
    'data.color_jitter': (lambda v: 0 <= v <= 1, 'in [0, 1]'),
    'data.randaugment_operations': (lambda v: 0 <= v <= 14, 'in 0 .. 14'),
    'data.randaugment_magnitude': (lambda v: 0 <= v <= 30, 'in [0, 30]'),
    'data.mixup': (lambda v: v == 0 or 0.01 <= v <= 100, '0, or in [0.01, 100]'),
    'data.cutmix': (lambda v: v == 0 or 0.01 <= v <= 100, '0, or in [0.01, 100]'),
    'data.mean': (_per_channel(0), 'one number in [0, 1] per channel, or ()'),
    'data.std': (_per_channel(1 / 255), 'one number in [1/255, 1] per channel, or ()'),
    'data.max_corrupt': (_not_negative, 'at least 0'),
    'data.workers': (lambda v: 0 <= v <= 512, 'in 0 .. 512'),
    'data.train_split': (lambda v: True, ''),
    'data.test_split': (lambda v: True, ''),
    'data.manual_dir': (lambda v: True, ''),
    'data.data_dir': (lambda v: True, ''),
    **_is_optimizer('logit'),
    'logit.momentum': (lambda v: 0 <= v < 1, 'in [0, 1)'),
    **_is_optimizer('feature'),
    **_is_optimizer('discriminator'),
    'log_every': (_positive, 'at least 1'),
    'checkpoint.every_steps': (_not_negative, 'at least 0 (0: none)'),
    'checkpoint.every_minutes': (_not_negative, 'at least 0 (0: none)'),
    'checkpoint.keep': (_positive, 'at least 1'),
    'on_nonfinite': (lambda v: v in ON_NONFINITE, f'one of {", ".join(ON_NONFINITE)}'),
    'saturation_steps': (_not_negative, 'at least 0 (0: never warn)'),
}


def _is(value: Any, kind: type) -> bool:
    """Returns whether the value is a `kind`; whole numbers are floats too, truth values are not."""
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind is tuple:
        return type(value) in (tuple, list)
    return type(value) is kind


def wrong_type(name: str, value: Any) -> str:
    """Returns the sentence for a value that is not of its field's type."""
    fields = flatten(default.get_config())
    if inside := [field for field in fields if field.startswith(f'{name}.')]:
        return f'config.{name}: is a section, not a field; assign one of {", ".join(inside)}'
    kind = type(fields.get(name, ''))
    words = {int: 'whole number', float: 'number', bool: 'truth value', str: 'string'}
    return f'config.{name}: must be a {words.get(kind, kind.__name__)}, but is {value!r}'


def check_names(names: Iterable[str]) -> None:
    """Refuses the first dotted name that is not a field, or section, of the schema."""
    fields = flatten(default.get_config())
    sections = {field.rsplit('.', 1)[0] for field in fields if '.' in field}
    for name in names:
        if name not in fields and name not in sections:
            raise UserError(f'config.{name}: there is no such field{nearest(name, fields)}')


def validate(config: ConfigDict) -> None:
    """Refuses an unknown, missing, wrongly typed or impossible field, with one UserError.

    What depends on the images, the networks or the devices is checked where those are known.
    """
    fields, given = flatten(default.get_config()), flatten(config)
    check_names(given)
    for name, like in fields.items():
        if name not in given:
            raise UserError(f'config.{name}: missing; start from configs/default.py and assign')
        value, kind = given[name], type(like)
        if not _is(value, kind):
            raise UserError(wrong_type(name, value))
        test, words = RULES[name]
        if kind is float and value and not _SMALLEST <= abs(value) <= _LARGEST:
            test, words = _never, f'0, or in size between {_SMALLEST} and {_LARGEST}'
        if not test(value):
            raise UserError(f'config.{name}: must be {words}, but is {value!r}')


def differences(old: dict, new: dict) -> list[str]:
    """Returns 'field: old -> new' for every field in which two flattened configs differ."""
    absent = '(absent)'
    return [
        f'{name}: {old.get(name, absent)!r} -> {new.get(name, absent)!r}'
        for name in dict.fromkeys([*old, *new])
        if old.get(name, absent) != new.get(name, absent)
    ]


def makes_the_run(name: str) -> bool:
    """Returns whether the bits of a run depend on the field (dotted name)."""
    return not _MAY_CHANGE.fullmatch(name)


def of_the_run(config: ConfigDict | dict) -> dict[str, Any]:
    """Returns the flattened fields that make the run, as JSON has them."""
    plain = json.loads(json.dumps(config.to_dict() if isinstance(config, ConfigDict) else config))
    return {name: value for name, value in flatten(plain).items() if makes_the_run(name)}


def of_the_command(config: ConfigDict) -> dict[str, Any]:
    """Returns the flattened fields that processes which run together must share, as JSON has them.

    All but where the data lie on each one's disk.
    """
    plain = flatten(json.loads(json.dumps(config.to_dict())))
    return {k: v for k, v in plain.items() if k not in ('data.manual_dir', 'data.data_dir')}


def steps_in(epochs: float, examples: int, batch_size: int) -> int:
    """Returns the number of steps after which `epochs` passes over the examples are complete.

    The order of the data is one endless stream of whole passes (batches.py), so a batch may hold
    the end of one pass and the start of the next: ceil(epochs * examples / batch_size).
    """
    return math.ceil(round(epochs * examples, 6) / batch_size)
