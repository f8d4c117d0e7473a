"""launch.py as a user runs it: a process of its own, files, exit codes."""

import gzip
import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import time

import pytest

from afkd_jax import cli

ROOT = pathlib.Path(__file__).parent.parent
SHORT = [
    '--config=configs/digits.py',
    '--config.epochs=6',
    '--config.data.train_examples=256',
    '--config.log_every=2',
    '--config.method=kd_ring',  # compiles in half the time of afd, which the demo runs
]


def command(*arguments):
    return [sys.executable, 'launch.py', *arguments]


ENVIRONMENT = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}


def launch(*arguments):
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('launch') / 'run'
    return workdir, launch(*SHORT, f'--workdir={workdir}')


def test_train_prints_a_table_and_writes_the_workdir(trained):
    workdir, process = trained
    assert process.returncode == 0, process.stderr
    assert process.stderr == ''
    assert 'epoch 1/6' in process.stdout
    assert 'validation %' in process.stdout
    assert process.stdout.count('1 resnet8') == 1
    assert 'ensemble' in process.stdout
    summary = json.loads((workdir / 'summary.json').read_text())
    assert summary['fingerprint'][:16] in process.stdout
    assert json.loads((workdir / 'config.json').read_text())['epochs'] == 6


def test_a_finished_run_says_so(trained):
    process = launch(*SHORT, f'--workdir={trained[0]}')
    assert process.returncode == 0
    assert 'this run is finished' in process.stdout


def test_eval_repeats_the_summary(trained):
    workdir, _ = trained
    process = launch(*SHORT, f'--workdir={workdir}', '--mode=eval')
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    summary = json.loads((workdir / 'summary.json').read_text())
    assert result['networks'] == summary['networks']
    assert result['ensemble'] == summary['ensemble']
    assert result['ring'] == summary['ring']
    assert result['step'] == summary['steps']


def start(workdir):
    return subprocess.Popen(
        command(*SHORT, f'--workdir={workdir}'),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.01)


def test_stopped_by_signals_and_started_again_is_the_same_run(trained, tmp_path):
    config, metrics = tmp_path / 'config.json', tmp_path / 'metrics.jsonl'
    # While it compiles, and among the steps.
    for condition in (config.exists, lambda: '"train"' in metrics.read_text()):
        process = start(tmp_path)
        wait_for(process, condition)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 75
        assert errors == 'stopping after this step, with a checkpoint; once more ends at once\n'
        assert 'the same command continues' in output
    again = launch(*SHORT, f'--workdir={tmp_path}')
    assert again.returncode == 0, again.stderr
    assert 'continues from step' in again.stdout
    ours, theirs = (
        json.loads((folder / 'summary.json').read_text())['fingerprint']
        for folder in (tmp_path, trained[0])
    )
    assert ours == theirs


def test_a_second_signal_ends_at_once(tmp_path):
    # Both come while it compiles: the main thread can act on neither.
    process = start(tmp_path)
    wait_for(process, (tmp_path / 'checkpoints').exists)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[1:] == ['error: interrupted; what was written before is intact']
    assert not (tmp_path / 'metrics.jsonl').exists()


@pytest.mark.parametrize(
    ('config', 'argument', 'overrides', 'name'),
    [
        ('digits', '', {}, 'digits'),
        ('cifar100', 'resnet32,wrn-16-4', {}, 'cifar100-resnet32-wrn-16-4'),
        ('digits', '', {'seed': 1, 'method': 'all+l1'}, 'digits-method=all-l1-seed=1'),
        (
            'digits',
            '',
            {'networks': ('resnet8', 'mobilenet_v2x0.5'), 'data.pad': 2},
            'digits-data.pad=2-networks=resnet8-mobilenet_v2x0.5',
        ),
    ],
)
def test_the_default_workdir_is_named_after_what_makes_the_run(config, argument, overrides, name):
    assert cli._run_name(config, argument, overrides) == name


def test_a_long_name_is_cut_but_still_tells_runs_apart():
    names = [
        cli._run_name('digits', '', {'networks': ('mobilenet_v2x0.75',) * 20, 'seed': seed})
        for seed in (0, 1)
    ]
    assert len(set(names)) == 2
    assert max(map(len, names)) < 200


def test_describe_ends_with_one_json_line():
    process = launch('--config=configs/digits.py', '--mode=describe')
    assert process.returncode == 0, process.stderr
    facts = json.loads(process.stdout.splitlines()[-1])
    assert [entry['parameters'] for entry in facts['networks']] == [77_754] * 2
    assert facts['networks'][0].keys() >= {'name', 'feature_map', 'test_accuracy'}


BAD_COMMANDS = {
    'no config': ([], '--config: name a config file'),
    'no such file': (['--config=configs/nothing.py'], 'there is no file configs/nothing.py'),
    'broken file': (['--config={small}/broken.py'], 'cannot be loaded .SyntaxError: '),
    'failing file': (['--config={small}/failing.py'], 'cannot be loaded .KeyError: '),
    'file without a config': (['--config={small}/empty.py'], 'cannot be loaded .*get_config'),
    'not a config': (['--config={small}/text.py'], 'must return a ConfigDict, not a str'),
    'unknown field': ([*SHORT, '--config.temprature=3'], 'did you mean "loss.temperature"'),
    'unknown section': ([*SHORT, '--config.date.pad=3'], 'did you mean "data.pad"'),
    'wrong type': (
        ['--config=configs/digits.py', '--config.epochs=many'],
        "config.epochs: must be a whole number, but is 'many'",
    ),
    'wrong type in a file': (
        ['--config={small}/mistyped.py'],
        "cannot be loaded: TypeError: .*'epochs'.* <class 'int'>",
    ),
    'no return': (['--config={small}/silent.py'], 'must return a ConfigDict, not a NoneType'),
    'impossible value': (
        [*SHORT, '--config.loss.temperature=-1'],
        'config.loss.temperature: .*-1.0',
    ),
    'unknown network': ([*SHORT, "--config.networks=('resnet8','resnet9')"], '"resnet9"'),
    'unknown network behind the file': (
        ['--config=configs/cifar100.py:resnet32,wrn-16-3x'],
        'no network is called "wrn-16-3x"; did you mean "wrn-16-4"',
    ),
    'an argument that a file does not take': (
        ['--config={small}/silent.py:resnet8'],
        'cannot be loaded.*get_config.. takes 0 positional arguments',
    ),
    'no file before the argument': (
        ['--config=configs/cifar1000.py:resnet32,resnet32'],
        'there is no file configs/cifar1000.py;',
    ),
    'a field twice': (
        [*SHORT, "--config.networks=('resnet8','resnet8')", "--config.networks=('resnet8',)"],
        'config.networks: given 2 times; give it once',
    ),
    'a section': (
        [*SHORT, '--config.loss=3'],
        'config.loss: is a section, not a field; assign one of .*loss.temperature',
    ),
    'wrong ring': ([*SHORT, '--config.ring_order=(1,3)'], r'config.ring_order: .*but is \(1, 3\)'),
    'images that cannot be trained on': (
        ['--config=configs/imagenet.py'],
        r'tfds:imagenet2012 are \(None, None, 3\)',
    ),
    'old field': ([*SHORT, '--config.temperature=3'], 'did you mean "loss.temperature"'),
    'one network': ([*SHORT, "--config.networks=('resnet8',)"], 'at least two'),
    'unknown method': (
        ['--config=configs/digits.py', '--config.method=akd'],
        'config.method: .*"akd"',
    ),
    'unknown mode': ([*SHORT, '--mode=tain'], 'tain'),
    'unknown flag': ([*SHORT, '--wrkdir=x'], 'wrkdir'),
    'stray word': ([*SHORT, 'train'], 'train: not understood'),
    'step while training': ([*SHORT, '--step=3'], '--step: 3 is only for --mode eval'),
    'eval of nothing': (
        [*SHORT, '--mode=eval', '--workdir=/nonexistent/run'],
        '/nonexistent/run holds no run',
    ),
    'small images': (
        ['--config=configs/digits.py', '--config.dataset=idx:{small}'],
        'images of 4x4 are too small for "resnet8"',
    ),
}


# Runs each command in a fork of a process that has imported everything: the imports, 2 s, are
# paid once.
SERVER = """
import json, os, runpy, sys, tempfile, traceback
sys.path.insert(0, os.getcwd())
import afkd_jax.data.tfds_source, afkd_jax.describe, afkd_jax.train

for line in sys.stdin:
    files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
    if not (child := os.fork()):
        for number, file in enumerate(files, start=1):
            os.dup2(file.fileno(), number)
        sys.argv, code = ['launch.py', *json.loads(line)], 99
        try:
            runpy.run_path('launch.py', run_name='__main__')
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in files:
        file.seek(0)
    print(json.dumps([code, *(file.read().decode() for file in files)]), flush=True)
"""


@pytest.fixture(scope='module')
def forked():
    server = subprocess.Popen(
        [sys.executable, '-c', SERVER],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(arguments):
        server.stdin.write(json.dumps(arguments) + '\n')
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield run
    server.communicate()


@pytest.mark.parametrize('name', BAD_COMMANDS)
def test_bad_input_gives_one_sentence(name, tmp_path, forked):
    arguments, sentence = BAD_COMMANDS[name]
    for prefix in ('train', 't10k'):
        images = struct.pack('>4I', 2051, 80, 4, 4) + bytes(80 * 16)
        labels = struct.pack('>2I', 2049, 80) + bytes(i % 4 for i in range(80))
        (tmp_path / f'{prefix}-images-idx3-ubyte.gz').write_bytes(gzip.compress(images))
        (tmp_path / f'{prefix}-labels-idx1-ubyte.gz').write_bytes(gzip.compress(labels))
    for file, text in (
        ('broken', 'def get_config(:'),
        ('failing', 'def get_config():\n    return {}["x"]'),
        ('empty', ''),
        ('text', 'def get_config():\n    return "config"'),
        ('silent', 'def get_config():\n    pass'),
        (
            'mistyped',
            'from configs import digits\n\n\ndef get_config():\n'
            '    config = digits.get_config()\n    config.epochs = "5"\n    return config',
        ),
    ):
        (tmp_path / f'{file}.py').write_text(text)
    code, output, errors = forked([argument.format(small=tmp_path) for argument in arguments])
    assert code == 1, output
    *warnings, line = errors.splitlines()
    assert line.startswith('error: ')
    assert not warnings or name == 'no return'  # there ml_collections warns too
    assert re.search(sentence, line), line
