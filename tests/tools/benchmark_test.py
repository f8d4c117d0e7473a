"""--mode benchmark."""

import csv
import dataclasses
import json
import re

import jax
import pytest
from conftest import PAIR, tiny_config

from afkd_jax.command import Command, Options
from afkd_jax.devices import mesh
from afkd_jax.errors import UserError
from afkd_jax.tools import benchmark, sweep


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(benchmark, 'BLOCKS', 2)
    monkeypatch.setattr(benchmark, 'BLOCK_S', 0.01)
    monkeypatch.setattr(benchmark, 'PRODUCT', {'cpu': 64})
    monkeypatch.setattr(mesh, 'available', lambda: jax.devices()[:2])


def test_figures_agree_with_each_other_and_the_plan(quick):
    result = benchmark.benchmark(tiny_config(batch_size=16))
    json.dumps(result)
    assert result['networks'] == list(PAIR)
    assert result['images_per_s'] == pytest.approx(16 / result['step_s'])
    low, high = result['step_s_quartiles']
    assert 0 < low <= high
    assert 0 < result['host_s'] < result['step_s']
    assert 0 < result['queued_step_s'] < 2 * result['step_s']
    assert 0 < result['augment_s'] < 1
    assert 0 < result['lower_s'] < result['compile_s']
    assert result['flops_per_s'] == pytest.approx(result['flops_per_step'] / result['step_s'])
    fraction = result['flops_per_s'] / result['matmul_flops_per_s']
    assert result['share_of_matmul'] == pytest.approx(fraction)
    assert result['peak_bytes'] > result['planned_bytes'] > 0
    assert '2 x cpu' in result['device']


def test_no_data_is_needed(quick):
    config = tiny_config(batch_size=16, dataset='tfds:cifar10', method='vanilla')
    assert benchmark.benchmark(config)['image_shape'] == [32, 32, 3]


def test_pmap_is_timed_too(quick):
    result = benchmark.benchmark(tiny_config(batch_size=16, mapping='pmap', method='vanilla'))
    assert result['step_s'] > 0
    assert result['augment_s'] > 0
    assert result['share_of_matmul'] > 0


def test_a_sweep_is_every_combination():
    configs = list(sweep.configs(tiny_config(), 'k=2,3; batch_size=8,16;method=afd'))
    assert [(len(one.networks), one.batch_size) for one in configs] == [
        (2, 8),
        (2, 16),
        (3, 8),
        (3, 16),
    ]
    assert {one.method for one in configs} == {'afd'}


@pytest.mark.parametrize(
    ('words', 'named'),
    [
        ('epochs=3', 'epochs=3'),
        ('k', '"k"'),
        ('k=2;k=3', 'k=3'),
        ('k=two', 'two'),
        ('k=1', 'networks'),
        ('dtype=float16', 'dtype'),
        ('batch_size=0', 'batch_size'),
        ('method=afd,typo', 'typo'),
        ('batch_size=16,17', 'config.batch_size: must be a multiple'),
    ],
)
def test_invalid_sweeps_are_rejected(words, named):
    with pytest.raises(UserError, match=re.escape(named)):
        sweep.configs(tiny_config(), words)


def test_results_are_appended_to_a_csv(tmp_path):
    file = tmp_path / 'new' / 'benchmark.csv'
    for k in (2, 3):
        sweep.append({'k': k, 'versions': {'jax': '1'}}, file)
    with file.open(newline='') as lines:
        rows = list(csv.DictReader(lines))
    assert [row['k'] for row in rows] == ['2', '3']
    assert json.loads(rows[0]['versions']) == {'jax': '1'}
    # Of another version: the old file is renamed.
    for _ in range(2):
        sweep.append({'batch': 1}, file)
    assert file.read_text().split() == ['batch', '1', '1']
    assert 'versions' in file.with_name('benchmark-1.csv').read_text()


def test_sweep_is_an_option_of_benchmark_only(forked):
    code, _, errors = forked(['--config', 'configs/digits.py', '--mode', 'train', '--sweep', 'k=2'])
    assert code == 1
    assert '--sweep: k=2 is only for --mode benchmark' in errors
    code, _, errors = forked(['--config', 'tests/tiny.py', '--mode', 'benchmark', '--sweep', 'k=1'])
    assert (code, 'config.networks: must' in errors) == (1, True)


def test_it_gives_json_and_appends_the_results_of_a_sweep(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where runs/benchmark.csv is made
    printed = []
    monkeypatch.setattr(benchmark, 'print_json', printed.append)
    given = dict.fromkeys(field.name for field in dataclasses.fields(Options))
    options = Options(**given | {'mode': 'benchmark', 'sweep': 'method=vanilla'})
    assert benchmark.main(Command(tiny_config(batch_size=16), options, tmp_path), None) == 0
    (result,) = json.loads(json.dumps(printed))
    with (tmp_path / 'runs/benchmark.csv').open(newline='') as lines:
        (row,) = csv.DictReader(lines)
    assert float(row['step_s']) == result['step_s']
    assert row['method'] == 'vanilla'
