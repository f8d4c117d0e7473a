"""Configs: every impossible field is refused with one message that names it and its value."""

import json
import pathlib
import re

import numpy as np
import pytest
from conftest import tiny_config

from afkd_jax import config as config_lib
from afkd_jax.config import Config
from afkd_jax.errors import UserError
from configs import default, digits, fashion_mnist


@pytest.mark.parametrize('module', [default, digits, fashion_mnist])
def test_shipped_configs_are_valid(module):
    Config.of(module.get_config())


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('networks', ('resnet8',), r'at least two network names .*but is \(.resnet8.,\)'),
        ('networks', (), 'at least two'),
        ('networks', 'resnet8', "must be a tuple, but is 'resnet8'"),
        ('networks', ('resnet8', 3), 'at least two network names'),
        ('networks', ('resnet8', ''), 'none empty'),
        ('networks', ('resnet8,resnet14',), 'each quoted'),
        ('method', 3, 'must be a string, but is 3'),
        ('method', '', 'name of a method'),
        ('loss.temperature', -1.0, r'in \[0.01, 1000\], but is -1.0'),
        ('loss.temperature', 0.0, 'in .0.01, 1000.'),
        ('loss.temperature', float('nan'), 'must be a number, but is nan'),
        ('loss.temperature', '3', "must be a number, but is '3'"),
        ('loss.kl_weight', -0.5, 'at least 0, but is -0.5'),
        ('loss.kl_ramp_up', 80.0, r'a fraction of the run, in \[0, 1\], but is 80.0'),
        ('loss.map_weight', -1.0, 'at least 0'),
        ('loss.adversarial_weight', float('inf'), 'must be a number'),
        ('loss.label_smoothing', 1.0, r'in \[0, 1\), but is 1.0'),
        ('ring_order', 2, 'must be a tuple, but is 2'),
        ('ring_order', (1, 2.0), r'whole numbers, one per network.*but is \(1, 2.0\)'),
        ('epochs', 0, 'at least 1, but is 0'),
        ('epochs', 1.5, 'must be a whole number, but is 1.5'),
        ('epochs', True, 'must be a whole number, but is True'),
        ('batch_size', -4, 'at least 1, but is -4'),
        ('eval_batch_size', 0, 'in 1 .. 65536, but is 0'),
        ('eval_batch_size', 10**9, 'in 1 .. 65536, but is 1000000000'),
        ('logit.learning_rate', 1e-300, '0, or in size between 1e-37 and 1e.38, but is 1e-300'),
        ('feature.weight_decay', 1e39, '0, or in size between'),
        ('seed', -1, 'in 0 .. 4294967295, but is -1'),
        ('mapping', 'vmap', "one of shard_map, pmap, but is 'vmap'"),
        ('dataset', 'tfds:', "NAME or NAME:ARGUMENT, as in .*but is 'tfds:'"),
        ('data.train_examples', -1, 'at least 0'),
        ('data.validation_fraction', 1.0, r'in \[0, 1\), but is 1.0'),
        ('data.pad', -1, 'at least 0, but is -1'),
        ('data.flip', 1, 'must be a truth value, but is 1'),
        ('logit.learning_rate', 0.0, 'above 0'),
        ('logit.learning_rate', float('inf'), 'must be a number, but is inf'),
        ('logit.momentum', 1.0, r'in \[0, 1\)'),
        ('logit.weight_decay', -0.1, 'at least 0, but is -0.1'),
        ('feature.schedule', 'linear', "one of constant, steps, cosine, but is 'linear'"),
        ('feature.boundaries', (0.5, 0.2), r'rising fractions of the run.*but is \(0.5, 0.2\)'),
        ('discriminator.boundaries', ('a',), 'rising fractions of the run'),
        ('logit.boundaries', (150.0, 225.0), r'each between 0 and 1.*but is \(150.0, 225.0\)'),
        ('discriminator.factor', 0.0, 'above 0'),
        ('log_every', 0, 'at least 1'),
        ('eval_every', 0, 'at least 1, but is 0'),
        ('checkpoint.keep', 0, 'at least 1'),
        ('checkpoint.every_steps', -1, 'at least 0'),
        ('checkpoint.every_minutes', -0.5, 'at least 0'),
        ('checkpoint.every_minutes', '10', "must be a number, but is '10'"),
        ('on_nonfinite', 'ignore', "one of stop, skip, but is 'ignore'"),
        ('saturation_steps', -1, 'at least 0'),
        ('profile', (3,), r'two whole numbers .*but is \(3,\)'),
        ('profile', (3, 4.0), 'two whole numbers'),
        ('profile', (0, 4), 'two whole numbers from 1 on'),
        ('profile', (4, 3), 'the first and the last step'),
    ],
)
def test_impossible_values_are_refused(field, value, message):
    with pytest.raises(UserError, match=f'^config.{field}: .*{message}'):
        tiny_config().replace(**{field: value})


def test_unknown_and_missing_fields_are_refused():
    config = digits.get_config()
    config.temprature = 3.0
    with pytest.raises(UserError, match=r'config.temprature: .*did you mean "loss.temperature"'):
        Config.of(config)
    config = digits.get_config()
    del config.data.pad
    with pytest.raises(UserError, match=r'config.data.pad: missing'):
        Config.of(config)


@pytest.mark.parametrize(
    ('name', 'meant'),
    [
        ('logit.lr', 'logit.learning_rate'),
        ('discriminator.lr', 'discriminator.learning_rate'),
        ('lr', 'logit.learning_rate'),
        ('wd', 'logit.weight_decay'),
        ('temperature', 'loss.temperature'),
        ('temp', 'loss.temperature'),
        ('date.pad', 'data.pad'),
        ('learning_rate', 'logit.learning_rate'),
        ('feature.rate', 'feature.learning_rate'),
        ('batch', 'batch_size'),
        ('batchsize', 'batch_size'),
        ('Epochs', 'epochs'),
        ('checkpont.kep', 'checkpoint.keep'),
        ('checkpoint.every_step', 'checkpoint.every_steps'),
        ('logit.scheduler', 'logit.schedule'),
        ('warmup', 'logit.warm_up'),
        ('logit.warmup', 'logit.warm_up'),
        ('swa', None),
        ('loss.ema', None),
        ('dropout', None),
        ('optimizer', 'adversarial.optimizer'),
        ('gpu', None),
        ('x', None),
        ('data.', None),
    ],
)
def test_only_close_fields_are_proposed(name, meant):
    assert config_lib.nearest_field(name) == meant
    end = f'did you mean "{meant}"?' if meant else 'afkd_jax/config.py lists all fields'
    with pytest.raises(UserError) as error:
        config_lib.check_names([name])
    assert str(error.value) == f'config.{name}: there is no such field; {end}'


def test_whole_numbers_are_accepted_where_fractions_are():
    assert tiny_config(loss__temperature=4).loss.temperature == 4


def test_numbers_and_arrays_of_numpy_are_accepted():
    config = digits.get_config()
    config.epochs, config.data.flip = np.int32(2), np.bool_(False)
    config.data.validation_fraction, config.logit.factor = np.float64(0.2), np.float32(0.5)
    config.logit.boundaries = np.array([0.25, 0.5])
    config.networks = tuple(np.array(['resnet8', 'resnet8']))
    checked = Config.of(config)
    expected = Config.of(digits.get_config()).replace(
        networks=('resnet8', 'resnet8'),
        **{'epochs': 2, 'data.flip': False, 'data.validation_fraction': 0.2, 'logit.factor': 0.5},
        **{'logit.boundaries': (0.25, 0.5)},
    )
    assert checked == expected
    json.dumps(checked.to_dict())
    assert expected.replace(epochs=np.int64(2), **{'logit.boundaries': (np.float64(0.25), 0.5)})
    with pytest.raises(UserError, match=r'validation_fraction: must be a number, but is nan'):
        expected.replace(**{'data.validation_fraction': np.float64('nan')})


def test_differences_name_each_field():
    old, new = (config_lib.flatten(tiny_config(data__pad=pad).to_dict()) for pad in (1, 3))
    assert config_lib.differences(old, old) == []
    assert config_lib.differences(old, new) == ['data.pad: 1 -> 3']
    del old['seed']
    assert config_lib.differences(old, new) == ['data.pad: 1 -> 3', "seed: '(absent)' -> 0"]


def test_a_run_from_before_a_field_was_added_has_its_default():
    # What a run of the first versions has: no switches of the adversary and of the optimizers.
    nested = tiny_config().to_dict()
    old = nested | {'logit': nested['logit'].copy(), 'discriminator': {}}
    del old['adversarial'], old['accumulate'], old['logit']['rule'], old['logit']['learning_rates']
    optimizer = ('learning_rate', 'weight_decay', 'schedule', 'boundaries', 'factor')
    old['discriminator'] = {name: nested['discriminator'][name] for name in optimizer}
    new = config_lib.run_fields(tiny_config())
    assert config_lib.run_fields(old) == new
    stored = config_lib.flatten(json.loads(json.dumps(old)))
    stored = {name: value for name, value in stored.items() if config_lib.defines_run(name)}
    assert config_lib.extended(stored, new) == new
    assert Config.of(config_lib.completed(old)) == tiny_config()
    del old['loss']['temperature']
    with pytest.raises(UserError, match=r'config\.loss\.temperature: missing'):
        Config.of(config_lib.completed(old))


@pytest.mark.parametrize(
    ('epochs', 'examples', 'batch_size', 'steps'),
    [(1, 64, 8, 8), (1, 65, 8, 9), (3, 65, 8, 25), (0.5, 64, 8, 4), (0.1, 30, 3, 1)],
)
def test_steps_in(epochs, examples, batch_size, steps):
    assert config_lib.steps_in(epochs, examples, batch_size) == steps


def test_config_imports_no_jax():
    source = pathlib.Path(config_lib.__file__).read_text()
    modules = re.findall(r'^(?:import|from) (\S+)', source, re.M)
    assert [name for name in modules if 'jax' in name] == ['afkd_jax.errors']
