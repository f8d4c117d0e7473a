"""The config: every field with its default and its rule, and the one check at the door.

A config file starts from `default_config()` and assigns fields; there is no other place for a
default, and a field that is not here is rejected. `Config.of` checks the result once; the rest of
the package takes the frozen dataclasses whole. Imports no JAX.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from afkd_jax.errors import UserError, did_you_mean, field_error

Section = TypeVar('Section')
Test = Callable[[Any], Any]

# The range of single precision: a smaller number would be 0 there, a larger one infinite.
_SMALLEST, _LARGEST = 1e-37, 1e38

SAFETENSORS = '.safetensors'  # the ending of an exported network

# Fields that may differ when a run resumes: no bit that it computes depends on them, except that
# mesh.* changes the rounding, as the number of devices does.
_MAY_CHANGE = re.compile(
    r'mesh\..*|checkpoint\..*|on_nonfinite|saturation_steps|trackers|profile'
    r'|data\.(manual_dir|data_dir|workers|placement|max_corrupt)'
)

# Fields that are newer than the first runs, which did what the default does.
_ADDED = re.compile(
    r'accumulate|profile|stages|teacher|ema\.decay|data\.views|adversarial\..*'
    r'|discriminator\.(loss|norm|condition|input|layers|width|r1|r1_every)'
    r'|logit\.(rule|nesterov|learning_rates|weight_decays|warm_up|clip_norm|decay_all)'
)
# Data sets that are named by their directory: the fingerprint of the images identifies them, so the
# directory may differ when a run resumes.
_PLACED = re.compile(r'(folder:|idx:).*', re.DOTALL)


def _field(default: Any, rule: str = '', test: Test = lambda value: True) -> Any:
    """Returns a field with its default, its rule ("must be ...") and the test of that rule."""
    return dataclasses.field(default=default, metadata={'rule': rule, 'test': test})


def _positive(default: float) -> Any:
    if isinstance(default, int):
        return _field(default, 'at least 1', lambda v: v >= 1)
    return _field(default, 'above 0', lambda v: v > 0)


def _not_negative(default: float, zero: str = '') -> Any:
    return _field(default, 'at least 0' + (f' (0: {zero})' if zero else ''), lambda v: v >= 0)


def _one_of(default: str, *values: str) -> Any:
    return _field(default, f'one of {", ".join(values)}', lambda v: v in values)


def _between(default: float, low: float, high: float, or_zero: bool = False) -> Any:
    words = f'in {low} .. {high}' if isinstance(default, int) else f'in [{low}, {high}]'
    if or_zero:
        return _field(default, f'0, or {words}', lambda v: v == 0 or low <= v <= high)
    return _field(default, words, lambda v: low <= v <= high)


def _fraction(default: float) -> Any:
    return _field(default, 'in [0, 1)', lambda v: 0 <= v < 1)


def _per_network(zero: str) -> Any:
    def test(v: Any) -> bool:
        return all(_is(x, float) and (x > 0 or (zero and x == 0)) for x in v)

    words = f'a tuple of numbers{zero or " above 0"}, one per network, as in "(0.1,0.02)", or ()'
    return _field((), words, test)


def _range(default: tuple[float, float], most: float, words: str) -> Any:
    def test(v: Any) -> bool:
        return len(v) == 2 and all(_is(x, float) for x in v) and 0 < v[0] <= v[1] <= most

    return _field(default, words, test)


def _per_channel(least: float, words: str) -> Any:
    def test(v: Any) -> bool:
        return len(v) in (0, 1, 3) and all(_is(x, float) and least <= x <= 1 for x in v)

    return _field((), f'one number in [{words}, 1] per channel, or ()', test)


@dataclasses.dataclass(frozen=True)
class Loss:
    """The losses. A weight that the method does not use has no effect."""

    temperature: float = _between(3.0, 0.01, 1000)  # T of the KL between logits
    kl_weight: float = _not_negative(1.0)  # of the KL in the logit loss
    # Fraction of the run in which the KL's weight grows to kl_weight; 0: none.
    kl_ramp_up: float = _field(0.0, 'a fraction of the run, in [0, 1]', lambda v: 0 <= v <= 1)
    map_weight: float = _not_negative(1.0)  # of a loss between maps (l1, ...) in the logit loss
    adversarial_weight: float = _not_negative(1.0)  # of L_G; Adam mostly divides its scale out
    label_smoothing: float = _fraction(0.0)  # of the cross-entropy


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The device mesh. Networks of one architecture can be sharded; the batch always is."""

    peer: int = _positive(1)  # devices over which the networks are sharded; 1: each has all
    data: int = _not_negative(0, 'all devices')  # shards of the batch; 0: all remaining devices


@dataclasses.dataclass(frozen=True)
class Data:
    """The images: which, where they are kept, how they are augmented."""

    train_examples: int = _not_negative(0, 'all')  # the first n of a fixed permutation
    validation_fraction: float = _fraction(0.0)  # of these training images, held out; 0: none
    test_examples: int = _not_negative(0, 'all')  # the first n of a fixed permutation
    # 'device': all images on every device; 'host': in memory, a batch at a time on the devices;
    # 'stream': on disk, read and decoded when needed; 'auto': 'device' where the images take at
    # most a quarter of its memory and are used as stored, else 'stream'.
    placement: str = _one_of('auto', 'auto', 'device', 'host', 'stream')
    # Side of the square to which images are cropped and resized; 0: as stored. Above 0 the images
    # are streamed, and mean and std must be given; pad and flip are applied afterwards.
    image_size: int = _not_negative(0, 'as stored')
    # With image_size: the area of a random training crop as a fraction of the image's, ...
    crop_scale: tuple[float, ...] = _range(
        (0.08, 1.0), 1, 'two rising numbers above 0, at most 1, as in "(0.08,1.0)"'
    )
    # ... its width divided by its height, ...
    crop_ratio: tuple[float, ...] = _range(
        (3 / 4, 4 / 3), 100, 'two rising numbers above 0, as in "(0.75,1.33)"'
    )
    eval_resize: int = _positive(256)  # ... and the shorter side before evaluation's centre crop.
    pad: int = _not_negative(4)  # pixels of zeros on each side before a random crop; 0: no crop
    flip: bool = _field(True)  # horizontal, with probability 1/2
    # Whether all networks see the same crop, flip and colours of an image, or each its 'own'.
    views: str = _one_of('shared', 'shared', 'own')
    color_jitter: float = _between(0.0, 0, 1)  # brightness, contrast, saturation in 1 +- this
    randaugment_operations: int = _between(0, 0, 14)  # RandAugment, 'stream' only; 0: none
    randaugment_magnitude: float = _between(9.0, 0, 30)
    # Alpha of the Beta distribution of the weights in mixup, and in cutmix; 0: off. With both, each
    # image gets either with probability 1/2.
    mixup: float = _between(0.0, 0.01, 100, or_zero=True)
    cutmix: float = _between(0.0, 0.01, 100, or_zero=True)
    # Per channel, of pixels in 0 .. 1; (): those of the training images.
    mean: tuple[float, ...] = _per_channel(0, '0')
    std: tuple[float, ...] = _per_channel(1 / 255, '1/255')
    max_corrupt: int = _not_negative(0)  # 'stream': undecodable images that are skipped
    workers: int = _between(0, 0, 512)  # 'stream': decoding processes; 0: threads
    # tfds only: which split is which, as in 'train[:90%]'; '': train, and test (else validation).
    train_split: str = _field('')
    test_split: str = _field('')
    manual_dir: str = _field('')  # tfds only: downloaded archives; '': none
    data_dir: str = _field('')  # tfds only: prepared sets; '': TFDS's default


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Adam with a schedule. Fractions of the run, so that a shortened run keeps its shape."""

    learning_rate: float = _positive(2e-5)
    weight_decay: float = _not_negative(0.0)  # added to the gradient of every parameter; 0: none
    # 'steps' multiplies by `factor` at each of `boundaries`; 'cosine' ends at 0.
    schedule: str = _one_of('steps', 'constant', 'steps', 'cosine')
    boundaries: tuple[float, ...] = _field(
        (0.25, 0.5),  # epochs 75 and 150 of 300
        'a tuple of rising fractions of the run, each between 0 and 1, as in "(0.5,0.75)"',
        lambda v: all(_is(x, float) and 0 < x < 1 for x in v) and list(v) == sorted(set(v)),
    )
    factor: float = _positive(0.1)


@dataclasses.dataclass(frozen=True)
class LogitOptimizer(Optimizer):
    """SGD with momentum, or another rule of optax; schedule as Optimizer."""

    momentum: float = _fraction(0.9)  # of 'sgd'; 0: none
    # 'sgd' and 'adam' add the weight decay to the gradient, 'adamw' and 'lion' to the direction
    # (decoupled). Betas are optax's: 0.9 and 0.999, of lion 0.9 and 0.99.
    rule: str = _one_of('sgd', 'sgd', 'adam', 'adamw', 'lion')
    nesterov: bool = _field(False)  # of 'sgd', 'adam' and 'adamw'
    # One value per network, instead of learning_rate and weight_decay; (): the same for all.
    # MobileNet and ShuffleNet are often trained at 0.01 or 0.02 beside a ResNet at 0.1.
    learning_rates: tuple[float, ...] = _per_network('')
    weight_decays: tuple[float, ...] = _per_network(' of at least 0')
    # Fraction of the run in which the rate rises linearly, on top of the schedule; 0: none.
    warm_up: float = _fraction(0.0)
    # A network's gradient is scaled down to this L2 norm, before weight decay; 0: never.
    clip_norm: float = _not_negative(0.0, 'no clipping')
    decay_all: bool = _field(True)  # False: no weight decay on biases and norms


@dataclasses.dataclass(frozen=True)
class Discriminator(Optimizer):
    """The discriminators: what they are, what they learn by, and their optimizer.

    Formulas and sources: docs/method.md, "The adversary's switches".
    """

    # 'lsgan': least squares of a sigmoid's output; 'lsgan_linear': without the sigmoid; 'hinge'.
    loss: str = _one_of('lsgan', 'lsgan', 'lsgan_linear', 'hinge')
    # 'batch': batch norm of real and fake maps apart; 'joint': of both in one batch; 'spectral'.
    norm: str = _one_of('batch', 'batch', 'joint', 'spectral', 'none')
    # Projection on the label, or on the softmax of the logits of the map's own network.
    condition: str = _one_of('none', 'none', 'label', 'probabilities')
    # 'map': one output per map; 'patch': one per location; 'pooled': of the map's mean.
    input: str = _one_of('map', 'map', 'patch', 'pooled')
    layers: int = _between(1, 1, 16)  # hidden ones, before the last
    width: int = _not_negative(0, "the map's channels")  # channels of the hidden layers
    r1: float = _not_negative(0.0, 'none')  # weight of the gradient penalty on real maps
    r1_every: int = _positive(16)  # steps per penalty, which is multiplied by it


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """How the networks learn from their discriminators."""

    # 'gradnorm': L_G gets the weight that makes its gradient at the map as large as the logit
    # loss's, at most balance_limit, times loss.adversarial_weight.
    balance: str = _one_of('none', 'none', 'gradnorm')
    balance_limit: float = _positive(1e4)
    # Fraction of the run in which the weight of L_G rises, as loss.kl_ramp_up; 0: none.
    warm_up: float = _field(0.0, 'a fraction of the run, in [0, 1]', lambda v: 0 <= v <= 1)
    # 'better_only': L_G is 0 where the teacher's cross-entropy on the batch is not lower.
    direction: str = _one_of('both', 'both', 'better_only')
    # 'logit': the gradient of L_G is added to the logit loss's; config.feature has no effect.
    optimizer: str = _one_of('own', 'own', 'logit')


@dataclasses.dataclass(frozen=True)
class Ema:
    """Exponential moving averages of the networks, which are evaluated besides them."""

    decay: float = _fraction(0.0)  # at most; min(1 - 1 / t, decay) in step t; 0: no averages


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are written, beside after each evaluation. No bit of a run depends on it."""

    every_epochs: int = _positive(1)
    every_steps: int = _not_negative(0, 'none')
    every_minutes: float = _not_negative(10.0, 'none')  # since the last one
    keep: int = _positive(3)  # the last n, besides each network's best on validation


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment. The defaults are the paper's main one: AFD, two ResNet-32, CIFAR-100."""

    networks: tuple[str, ...] = _field(
        ('resnet32', 'resnet32'),
        'a tuple of at least two network names (one has nobody to learn from), none empty, '
        "each quoted, as in \"('resnet8','resnet20')\"",
        lambda v: len(v) >= 2 and all(isinstance(x, str) and x for x in v),
    )
    # The networks, counted from 1, so that each teaches the next and the last the first, as in
    # (1, 3, 2); (): as listed.
    ring_order: tuple[int, ...] = _field(
        (),
        'a tuple of whole numbers, one per network, or () for the order of config.networks',
        lambda v: all(_is(x, int) for x in v),
    )
    # Where each network starts: 'RUN:NUMBER', network NUMBER of the run in directory RUN, or an
    # exported 'FILE.safetensors'; '': random weights. ('runs/a:1', ''); (): all random.
    init_from: tuple[str, ...] = _field(
        (),
        "a tuple with one string per network, as in \"('runs/a:1','')\", or ()",
        lambda v: all(isinstance(x, str) for x in v),
    )
    # The networks, counted from 1, that never change and only teach, from init_from. An entry of
    # `networks` in the form of init_from is such a network.
    frozen: tuple[int, ...] = _field(
        (),
        'a tuple of rising numbers of networks, counted from 1, or ()',
        lambda v: all(_is(x, int) for x in v) and list(v) == sorted(set(v)),
    )
    method: str = _field('afd', 'the name of a method', bool)  # see method/presets.py
    # Logits and maps come from the teachers' 'live' weights, or from averages of them (ema.decay).
    teacher: str = _one_of('live', 'live', 'ema')
    ema: Ema = Ema()
    # How many of the trunks' last stages have their maps compared, each with transfer layers and
    # discriminators of its own; 1: the feature map alone.
    stages: int = _positive(1)
    epochs: int = _positive(300)  # passes over the training images
    batch_size: int = _positive(128)  # images per step, over all devices
    eval_batch_size: int = _between(1000, 1, 2**16)  # likewise, in evaluation
    seed: int = _between(0, 0, 2**32 - 1)  # weights, order, augmentation, dropout; not the splits
    mapping: str = _one_of('shard_map', 'shard_map', 'pmap')  # how devices run the step
    mesh: Mesh = Mesh()
    # Networks and discriminators compute in this. Parameters, statistics, losses and optimizers
    # are float32 either way.
    dtype: str = _one_of('float32', 'float32', 'bfloat16')
    # Batch norms use the statistics of the 'global' batch, or each device's 'local' ones: fewer
    # collectives, but the result depends on the number of shards.
    batch_statistics: str = _one_of('global', 'global', 'local')
    loss: Loss = Loss()
    dataset: str = _field(
        'tfds:cifar100',
        'NAME or NAME:ARGUMENT, as in digits or tfds:cifar10',
        lambda v: re.fullmatch(r'[\w.-]+(:.+)?', v),
    )
    data: Data = Data()
    # Updates trunks and classifiers from the logit loss. Epochs 150 and 225 of 300.
    logit: LogitOptimizer = LogitOptimizer(0.1, weight_decay=1e-4, boundaries=(0.5, 0.75))
    feature: Optimizer = Optimizer()  # updates trunks and transfer layers from L_G
    discriminator: Discriminator = Discriminator()
    adversarial: Adversarial = Adversarial()
    # Every optimizer averages the gradients of so many steps before it moves; the steps in between
    # change batch statistics only, and steps left over at the end of the run change no parameter.
    accumulate: int = _positive(1)
    log_every: int = _positive(50)  # steps per line of metrics.jsonl
    # Epochs per evaluation; the last one is always evaluated. No array depends on it, but which
    # checkpoint is the best does.
    eval_every: int = _positive(1)
    # What else receives the values of the run: 'tensorboard', or your own (docs/extending.md).
    trackers: tuple[str, ...] = _field(
        (),
        'a tuple of names, each quoted, as in "(\'tensorboard\',)", or ()',
        lambda v: all(isinstance(x, str) and x for x in v),
    )
    # Steps, counted from 1, of which a trace for TensorBoard or Perfetto is written; (): none.
    profile: tuple[int, ...] = _field(
        (),
        'two whole numbers from 1 on, the first and the last step, as in "(10,12)", or ()',
        lambda v: not v or (len(v) == 2 and all(_is(x, int) for x in v) and 1 <= v[0] <= v[1]),
    )
    checkpoint: Checkpoint = Checkpoint()
    # After a step with a loss or gradient that is not finite: 'stop' the run, or 'skip' the step,
    # which changes no array and is counted.
    on_nonfinite: str = _one_of('stop', 'stop', 'skip')
    # Warn when a discriminator's mean outputs have been within 0.02 of 0 or 1 for so many steps.
    saturation_steps: int = _not_negative(500, 'never warn')

    @classmethod
    def of(cls, config: ConfigDict | Mapping[str, Any]) -> 'Config':
        """Returns the checked config.

        What depends on the images, networks or devices is checked where those are known.

        Raises:
          UserError: a field is unknown, missing, of the wrong type or outside its rule.
        """
        given = flatten(config)
        check_names(given)
        return _checked(cls, given, '')

    def replace(self, **fields: Any) -> 'Config':
        """Returns a copy with these fields, checked anew; 'a.b' names a field of a section."""
        nested = self.to_dict()
        for name, value in fields.items():
            *sections, leaf = name.split('.')
            inner = nested
            for section in sections:
                inner = inner[section]
            inner[leaf] = value
        return Config.of(nested)

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain dicts."""
        return dataclasses.asdict(self)


class _Fields(ConfigDict):
    """A ConfigDict to which numbers and arrays of NumPy and JAX can be assigned too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, _plain(value))


def _plain(value: Any) -> Any:
    """Returns a value with the numbers and arrays of NumPy and JAX in it as Python's."""
    if type(value) in (tuple, list):
        return type(value)(map(_plain, value))
    return value.tolist() if hasattr(value, 'tolist') else value


def default_config(networks: str | Iterable[str] = Config.networks) -> ConfigDict:
    """Returns every field with its default, for a config file to assign to.

    Args:
      networks: names, or one string with commas, as in `--config FILE.py:resnet20,resnet20`.
    """
    names = networks.split(',') if isinstance(networks, str) else networks
    fields = Config().to_dict().items()
    config = _Fields({n: _Fields(v) if isinstance(v, dict) else v for n, v in fields})
    config.networks = tuple(name.strip() for name in names)
    return config


def _checked(kind: type[Section], given: Mapping[str, Any], prefix: str) -> Section:
    values = {}
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        name = prefix + field.name
        if dataclasses.is_dataclass(field.default):
            values[field.name] = _checked(type(field.default), given, f'{name}.')
            continue
        if name not in given:
            raise UserError(f'config.{name}: missing; start from default_config() and assign')
        value, of = _plain(given[name]), type(field.default)
        if not _is(value, of):
            raise UserError(wrong_type(name, value))
        if of is float and value and not _SMALLEST <= abs(value) <= _LARGEST:
            raise field_error(name, f'0, or in size between {_SMALLEST} and {_LARGEST}', value)
        if not field.metadata['test'](value):
            raise field_error(name, field.metadata['rule'], value)
        values[field.name] = tuple(value) if of is tuple else value
    return kind(**values)


def _is(value: Any, kind: type) -> bool:
    """Returns whether the value is a `kind`; whole numbers are floats too, truth values are not."""
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind is tuple:
        return type(value) in (tuple, list)
    return type(value) is kind


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Returns {'data.pad': 4, ...}: every leaf under its dotted name, in the config's order."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            flat |= flatten(value, f'{prefix}{key}.')
        else:
            flat[prefix + key] = value
    return flat


DEFAULTS = flatten(Config().to_dict())  # dotted name -> default


def names_weights(entry: str) -> bool:
    """Returns whether an entry of config.networks names trained weights, not an architecture."""
    return entry.endswith(SAFETENSORS) or re.fullmatch(r'.+:\d+', entry) is not None


def wrong_type(name: str, value: Any) -> str:
    """Returns the error message for a value that is not of its field's type."""
    if inside := [field for field in DEFAULTS if field.startswith(f'{name}.')]:
        return f'config.{name}: is a section, not a field; assign one of {", ".join(inside)}'
    kind = type(DEFAULTS.get(name, ''))
    words = {int: 'whole number', float: 'number', bool: 'truth value', str: 'string'}
    return str(field_error(name, f'a {words.get(kind, kind.__name__)}', value))


def check_names(names: Iterable[str]) -> None:
    """Rejects the first dotted name that is neither a field nor a section."""
    sections = {field.rsplit('.', 1)[0] for field in DEFAULTS if '.' in field}
    for name in names:
        if name not in DEFAULTS and name not in sections:
            meant = nearest_field(name)
            end = did_you_mean(meant) if meant else '; afkd_jax/config.py lists all fields'
            raise UserError(f'config.{name}: there is no such field{end}')


def nearest_field(name: str) -> str | None:
    """Returns the field that is probably meant by a wrong (dotted) name; None if none is close.

    Last components are compared: the same, else initials ('lr'), else a word or the beginning of
    one ('rate', 'temp'), else a similar spelling. Of several, one in the named section comes first.
    """
    *sections, wrong = name.lower().split('.')
    fields = sorted(DEFAULTS, key=lambda field: field.split('.')[:-1] != sections)
    leaves = [field.rsplit('.', 1)[-1] for field in fields]

    def has_initials(leaf: str) -> bool:
        return '_' in leaf and ''.join(word[0] for word in leaf.split('_')) == wrong

    def has_word(leaf: str) -> bool:
        return any(word.startswith(wrong) for word in leaf.split('_')) and len(wrong) > 2

    tests: tuple[Test, ...] = (
        lambda leaf: leaf == wrong,
        has_initials,
        has_word,
        lambda leaf: leaf in difflib.get_close_matches(wrong, leaves, n=1, cutoff=0.75),
    )
    found = (
        field for test in tests for field, leaf in zip(fields, leaves, strict=True) if test(leaf)
    )
    return next(found, None)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns 'field: old -> new' for every field in which two flattened configs differ."""
    absent = '(absent)'
    return [
        f'{name}: {old.get(name, absent)!r} -> {new.get(name, absent)!r}'
        for name in dict.fromkeys([*old, *new])
        if old.get(name, absent) != new.get(name, absent)
    ]


def defines_run(name: str) -> bool:
    """Returns whether the bits of a run depend on the field (dotted name)."""
    return not _MAY_CHANGE.fullmatch(name)


def run_fields(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flattened fields that define the run, as JSON has them.

    Of a data set that is named by its directory only the kind does.
    """
    fields = {name: value for name, value in _as_json(config).items() if defines_run(name)}
    if 'dataset' in fields:
        fields['dataset'] = _PLACED.sub(r'\1', str(fields['dataset']))
    return fields


def completed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flattened fields of a run, with the defaults of those that are newer than it."""
    added = {name: value for name, value in DEFAULTS.items() if _ADDED.fullmatch(name)}
    return flatten(json.loads(json.dumps(added))) | flatten(fields)


def extended(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the run_fields `old`, completed, with the epochs of `new` where those are more."""
    old = {name: value for name, value in completed(old).items() if defines_run(name)}
    epochs = old.get('epochs')
    longer = isinstance(epochs, int) and epochs < new['epochs']
    return {**old, 'epochs': new['epochs']} if longer else dict(old)


def command_fields(config: Config) -> dict[str, Any]:
    """Returns the flattened fields that the processes of one run must share, as JSON has them.

    That is all except where the data lie on each one's disk.
    """
    own = ('data.manual_dir', 'data.data_dir')
    return {name: value for name, value in _as_json(config).items() if name not in own}


def _as_json(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    plain = config.to_dict() if isinstance(config, Config) else completed(config)
    return flatten(json.loads(json.dumps(plain)))


def steps_in(epochs: float, examples: int, batch_size: int) -> int:
    """Returns the number of steps after which `epochs` passes over the examples are complete.

    The order of the data is one endless stream of whole passes (data/order.py), so a batch may hold
    the end of one pass and the start of the next: ceil(epochs * examples / batch_size).
    """
    return math.ceil(round(epochs * examples, 6) / batch_size)
