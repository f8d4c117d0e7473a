"""The experiments: every row of docs/experiments.md is one command, whose config is golden.

golden.txt holds the whole schema, and of each experiment what it changes. After a change that is
meant: UPDATE_GOLDEN=1 python -m pytest tests/experiments_test.py
"""

import importlib
import os
import pathlib
import re

import pytest

from afkd_jax import config as config_lib
from afkd_jax.config import Config
from afkd_jax.tools import describe

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = pathlib.Path(__file__).with_name('golden.txt')
PAGE = ROOT / 'docs' / 'experiments.md'
COMMANDS = re.findall(r'`python launch.py --config ([^`]+)`', PAGE.read_text())


def resolved(command):
    """Returns the config of a command's arguments, without a process of its own."""
    file, *overrides = command.split(' --config.')
    path, _, argument = file.partition(':')
    module = importlib.import_module(path.removesuffix('.py').replace('/', '.'))
    config = module.get_config(*([argument] if argument else []))
    for override in overrides:
        name, value = override.split('=')
        kind = type(config_lib.flatten(config)[name])
        config.update_from_flattened_dict({name: kind(value)})
    return Config.of(config)


def test_the_configs_are_the_golden_ones():
    schema = config_lib.DEFAULTS
    lines = ['configs/default.py', *(f'  {name} = {value!r}' for name, value in schema.items())]
    for command in COMMANDS:
        changes = config_lib.differences(schema, config_lib.flatten(resolved(command).to_dict()))
        lines += ['', command, *(f'  {change}' for change in changes)]
    text = '\n'.join(lines) + '\n'
    if os.environ.get('UPDATE_GOLDEN'):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_a_config_files_docstring_names_its_experiments():
    for command in COMMANDS:
        path, _, argument = command.split(' ')[0].partition(':')
        if argument:
            assert re.search(rf'[\s:]{argument}\s', (ROOT / path).read_text()), command


@pytest.mark.parametrize('command', COMMANDS)
def test_every_experiment_is_described(command, tmp_path):
    config = resolved(command)
    config = config.replace(**{'data.data_dir': str(tmp_path)})
    if config.dataset.startswith('idx:'):
        config = config.replace(dataset='tfds:fashion_mnist')  # the same images, not read
    facts = describe.describe(config)
    assert [entry['name'] for entry in facts['networks']] == list(config.networks)
    assert all(row['name'] in describe.text(facts) for row in facts['networks'])
