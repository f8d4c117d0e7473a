"""launch.py as a user runs it: a process of its own, files, exit codes."""

import gzip
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import types

import forks
import kills
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image
from sklearn import datasets

from afkd_jax import cli
from afkd_jax.checkpoints import starts
from afkd_jax.command import Command, Options
from afkd_jax.config import Config
from afkd_jax.devices import processes
from afkd_jax.devices.signals import Interrupt
from afkd_jax.errors import UserError
from afkd_jax.report import console
from configs import digits

ROOT = pathlib.Path(__file__).parent.parent
SHORT = kills.RUN
# What a whole run shows depends on no architecture; bad input is read without loading JAX.
kills.RUN = TINY = ['--config=tests/tiny.py', *SHORT[1:]]
ENVIRONMENT = forks.environment()


def launch(*arguments):
    code, output, errors = forks.Launch(arguments, ENVIRONMENT).end()
    return types.SimpleNamespace(returncode=code, stdout=output, stderr=errors)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('launch') / 'run'
    return workdir, launch(*TINY, f'--workdir={workdir}')


def test_train_prints_a_table_and_writes_the_workdir(trained):
    workdir, process = trained
    assert process.returncode == 0, process.stderr
    assert process.stderr == ''
    assert re.search(r'^epoch 1/6 .* img/s  loss .*  val % .* ensemble', process.stdout, re.M)
    assert process.stdout.count('1 tiny-8-2') == 1
    assert 'ensemble' in process.stdout
    summary = json.loads((workdir / 'summary.json').read_text())
    assert summary['fingerprint'][:16] in process.stdout
    assert json.loads((workdir / 'config.json').read_text())['epochs'] == 6

    assert '{' not in process.stdout  # JSON only where it is asked for
    *_, last = process.stdout.splitlines()
    assert re.fullmatch(
        r'[\d.]+ s: data [\d.]+, compile [\d.]+, train [\d.]+, evaluate [\d.]+, save [\d.]+, '
        r'other [\d.]+',
        last,
    )


def test_a_finished_run_says_so(trained):
    process = launch(*TINY, f'--workdir={trained[0]}', '--json')
    assert process.returncode == 0
    assert 'this run is finished' in process.stderr
    assert json.loads(process.stdout) == json.loads((trained[0] / 'summary.json').read_text())


def test_eval_repeats_the_summary(trained):
    workdir, _ = trained
    process = launch(*TINY, f'--workdir={workdir}', '--mode=eval', '--json')
    assert process.returncode == 0, process.stderr
    assert process.stdout.count('\n') == 1
    assert '1 tiny-8-2' in process.stderr  # the tables
    result = json.loads(process.stdout)
    summary = json.loads((workdir / 'summary.json').read_text())
    assert result['networks'] == summary['networks']
    assert result['ensemble'] == summary['ensemble']
    assert result['ring'] == summary['ring']
    assert result['step'] == summary['steps']
    assert 'confusion' not in process.stdout + process.stderr
    classes = json.loads((workdir / 'classes.json').read_text())
    assert result['classes']['ensemble']['accuracy'] == classes['ensemble']['accuracy']


def test_the_run_directory_alone_is_enough(tmp_path):
    workdir = tmp_path / 'run'  # of networks that are not registered by a config file
    config = '--config=configs/digits.py:densenet-10-4,densenet-10-4'
    one_step = ['--config.epochs=1', '--config.data.train_examples=64', '--config.method=kd_ring']
    one_step.append('--config.data.validation_fraction=0.0')
    process = launch(config, *one_step, f'--workdir={workdir}')
    assert process.returncode == 0, process.stderr
    pixels = (datasets.load_digits().images[:3] * 15).astype('uint8')
    for i, image in enumerate(pixels):  # of the classes 0, 1 and 2
        (tmp_path / 'images' / str(i)).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / 'images' / str(i) / 'image.png')
    given = [f'--workdir={workdir}', '--step=1', '--network=2', f'--output={tmp_path}/out']
    process = launch('--mode=predict', f'--images={tmp_path}/images', '--json', *given)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert (result['network'], result['step'], result['labelled']) == ('2 densenet-10-4', 1, 3)
    assert (tmp_path / 'out').read_text().startswith('file,class,probability,class_2,')
    process = launch('--mode=export', '--format=safetensors', *given)
    assert (process.returncode, 'out exists; delete it' in process.stderr) == (1, True)
    process = launch('--mode=export', '--format=safetensors', *given[:-1], f'--output={tmp_path}/w')
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / 'w.json').read_text())['architecture'] == ['densenet-10-4']
    process = launch('--mode=describe', f'--workdir={workdir}', '--json')
    assert json.loads(process.stdout)['method'] == 'kd_ring'
    process = launch('--mode=eval', f'--workdir={workdir}', '--config.seed=1')
    assert (process.returncode, 'name it too, by --config FILE' in process.stderr) == (1, True)


def start(workdir, **environment):
    return kills.Process([*SHORT, f'--workdir={workdir}'], ENVIRONMENT | environment).popen


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.01)


def test_stopped_by_signals_and_started_again_is_the_same_run(trained, tmp_path):
    config, metrics = tmp_path / 'config.json', tmp_path / 'metrics.jsonl'
    # While it compiles, and among the steps.
    for condition, when in (
        (config.exists, '(before the first step|after the compilation)'),
        (lambda: '"train"' in metrics.read_text(), 'after this step, with a checkpoint'),
    ):
        process = forks.Launch([*TINY, f'--workdir={tmp_path}'], ENVIRONMENT)
        wait_for(process, condition)
        process.send_signal(signal.SIGINT)
        code, output, errors = process.end()
        assert code == 75
        assert re.fullmatch(f'SIGINT: stops {when}; once more ends at once\n', errors)
        assert 'the same command continues' in output
        so_far = json.loads((tmp_path / 'summary.json').read_text())
        assert not so_far['finished']
    assert so_far['steps'] > 0
    again = launch(*TINY, f'--workdir={tmp_path}')
    assert again.returncode == 0, again.stderr
    assert 'continues from step' in again.stdout
    assert kills.fingerprint(tmp_path) == kills.fingerprint(trained[0])
    assert kills.logged(tmp_path) == kills.logged(trained[0])


def test_killed_three_times_also_while_it_saves_it_is_the_same_run(trained, tmp_path):
    # The second kill of this seed comes 0.9 s after the start.
    counts = kills.kill_until_it_ends(
        tmp_path / 'run', 3, random.Random(24), ENVIRONMENT, forks.Launch
    )
    assert counts['kills'] == 3
    assert counts['during_a_save'] >= 1
    assert kills.fingerprint(tmp_path / 'run') == kills.fingerprint(trained[0])
    assert kills.logged(tmp_path / 'run') == kills.logged(trained[0])


def test_a_signal_before_the_run_begins_is_no_loss(tmp_path):
    process = start(tmp_path / 'run')
    maps = pathlib.Path(f'/proc/{process.pid}/maps')
    wait_for(process, lambda: 'jaxlib' in maps.read_text())  # it is being imported
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert 'run: stopped by a signal before it began; the same command continues' in output
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / 'run').exists()


def test_networks_that_name_weights_are_read_where_signals_stop_a_run(tmp_path, monkeypatch):
    config = Config.of(digits.get_config()).replace(networks=('runs/a:1', 'resnet8'))
    options = Options('train', *[None] * 6, False, None, False)
    command = Command(config, options, tmp_path)
    monkeypatch.setattr(cli, '_command', lambda *_: command)
    monkeypatch.setattr(processes, 'start', lambda *_: None)
    stoppable = []

    def resolved(*_):
        stoppable.append(isinstance(signal.getsignal(signal.SIGTERM).__self__, Interrupt))
        raise UserError('runs/a')

    monkeypatch.setattr(starts, 'resolved', resolved)
    with pytest.raises(UserError, match='runs/a'):
        cli._run(None, options)
    assert stoppable == [True]


def test_a_second_signal_ends_at_once(tmp_path):
    # Both come while it compiles: the main thread can act on neither.
    process = start(tmp_path)
    wait_for(process, (tmp_path / 'checkpoints' / '0').exists)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[1:] == ['error: interrupted; what was written before is intact']
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['0']


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
        ('digits', '', {'data.data_dir': '/data/tfds', 'data.workers': 3}, 'digits'),
        (
            'cifar100',
            'resnet32,/data/of/others/runs/a:1',
            {},
            'cifar100-resnet32-a-cc5769-1',
        ),
        ('digits', '', {'init_from': ('runs/a:1', '')}, 'digits-init_from=runs-a-1'),
        (
            'digits',
            '',
            {'dataset': 'folder:/data/of/everybody/flowers', 'networks': ('resnet8', '/w/a:1')},
            'digits-dataset=folder-flowers-a2bd03-networks=resnet8-w-a-1',
        ),
        (
            'digits',
            '',
            {'init_from': ('/data/of/others/runs/a:2', '/data/of/others/runs/a.safetensors')},
            'digits-init_from=a-cc5769-2-a.safetensors-187513',
        ),
    ],
)
def test_the_default_workdir_is_named_after_what_makes_the_run(config, argument, overrides, name):
    assert cli._run_name(config, argument, overrides) == name


@pytest.mark.parametrize(
    ('overrides', 'name'),
    [
        ('--config.seed=0 --config.loss.temperature=3 --config.data.pad=1', 'digits'),
        ("--config.networks=('resnet8','resnet8') --noconfig.data.flip", 'digits'),
        ('--config.ring_order=() --config.seed=1', 'digits-seed=1'),
        ('--config.seed=1 --config.seed=0', 'digits'),
        ('--config.data.flip', 'digits-data.flip=True'),
    ],
)
@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')  # of ml_collections
def test_fields_that_equal_the_config_files_do_not_name_the_workdir(overrides, name, monkeypatch):
    argv = ['launch.py', f'--config={ROOT}/configs/digits.py', *overrides.split()]
    monkeypatch.setattr(sys, 'argv', argv)
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file('config', flag_values=values)
    values(cli._last_values(argv))
    monkeypatch.setattr(flags, 'FLAGS', values)
    options = types.SimpleNamespace(workdir=None, mode='train')
    assert cli._command(holder, options).workdir == pathlib.Path('runs', name)


@pytest.mark.parametrize(
    ('given', 'used'),
    [
        ('--config.seed=1 --config=c.py --config.seed=2', '--config=c.py --config.seed=2'),
        ('--config.seed 1 -config.seed 2 --mode plan', '-config.seed 2 --mode plan'),
        ('--config.data.flip --debug --noconfig.data.flip', '--debug --noconfig.data.flip'),
        ('--config.networks=("a",) --config.networks ("b",)', '--config.networks ("b",)'),
        ('--config.seed=1 --config.epochs=1', '--config.seed=1 --config.epochs=1'),
    ],
)
def test_the_last_value_of_a_field_is_valid(given, used):
    assert cli._last_values(['launch.py', *given.split()]) == ['launch.py', *used.split()]


def test_a_long_name_is_cut_but_still_tells_runs_apart():
    names = [
        cli._run_name('digits', '', {'networks': ('mobilenet_v2x0.75',) * 20, 'seed': seed})
        for seed in (0, 1)
    ]
    assert len(set(names)) == 2
    assert max(map(len, names)) < 200


def test_describe_prints_words_or_json():
    process = launch('--config=configs/digits.py', '--mode=describe', '--json')
    assert process.returncode == 0, process.stderr
    assert 'network 1: resnet8, 77,754 parameters' in process.stderr
    facts = json.loads(process.stdout)
    assert [entry['parameters'] for entry in facts['networks']] == [77_754] * 2
    assert facts['networks'][0].keys() >= {'name', 'feature_map', 'test_accuracy'}


IDX = ['--config=configs/digits.py', '--config.batch_size=8', '--config.dataset=idx:{small}']
RUN = [*TINY, '--workdir={small}/run']


# What is done to the files of a bad command's folder first.
def damaged_idx(how):
    def prepare(folder):
        shape, labels = (80, 4, 4), bytes(i % 4 for i in range(80))
        size = 80 * 16
        images = folder / 'train-images-idx3-ubyte.gz'

        def write(content, path=images):
            path.write_bytes(gzip.compress(content))

        header = struct.pack('>4I', 2051, *shape)
        if how == 'cut':
            images.write_bytes(images.read_bytes()[:-10])
        if how == 'no gzip':
            images.write_bytes(header + bytes(size))
        if how == 'magic':
            write(struct.pack('>4I', 0xD03, *shape) + bytes(size))
        if how == 'too few':
            write(header + bytes(size - 16))
        if how == 'too many':
            write(header + bytes(size + 1))
        if how == 'claims':
            write(struct.pack('>4I', 2051, 2**32 - 1, 65535, 65535) + bytes(size))
        if how == 'lengths':
            write(struct.pack('>2I', 2049, 79) + labels[:79], folder / 'train-labels-idx1-ubyte.gz')
        if how == 'label':
            write(
                struct.pack('>2I', 2049, 80) + labels[:79] + bytes([9]),
                folder / 't10k-labels-idx1-ubyte.gz',
            )

    return prepare


def checkpoints_of(folder):
    (folder / 'run/summary.json').unlink()
    return list((folder / 'run/checkpoints').iterdir())


def cut_records(folder):
    for path in checkpoints_of(folder):
        os.truncate(path / 'record.json', 100)


def flip_files(folder):
    for path in checkpoints_of(folder):
        file = path / 'arrays/manifest.ocdbt'
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


def remove_arrays(folder):
    for path in checkpoints_of(folder):
        shutil.rmtree(path / 'arrays')


def remove(name):
    def prepare(folder):
        checkpoints_of(folder)
        path = folder / 'run' / name
        shutil.rmtree(path) if name.endswith('/') else path.unlink()

    return prepare


def replace(name, text):
    def prepare(folder):
        remove(name)(folder)
        path = folder / 'run' / name
        path.mkdir() if text is None else path.write_text(text)

    return prepare


def lock(folder):
    checkpoints_of(folder)
    (folder / 'run/lock').write_text(
        f'filelock/2\npid={os.getpid()}\nhost={socket.gethostname()}\n'
        'mode=lease\ntoken=ab\nduration=30.0\n'
    )


# Name: the arguments, what the message must hold, and perhaps what is done to the files before.
BAD_COMMANDS = {
    'no config': ([], '--config: name a config file'),
    'no such file': (['--config=configs/nothing.py'], 'there is no file configs/nothing.py'),
    'broken file': (['--config={small}/broken.py'], 'cannot be loaded .SyntaxError: '),
    'failing file': (['--config={small}/failing.py'], 'cannot be loaded .KeyError: '),
    'file that ends': (['--config={small}/ending.py'], 'cannot be loaded .SystemExit: no luck'),
    'frozen config': (['--config={small}/frozen.py'], 'return a ConfigDict of it'),
    'fields after --': ([*SHORT, '--', '--config.seed=1'], 'seed=1: .* leave out the --'),
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
        'there is no network "wrn-16-3x"; did you mean "wrn-16-4"',
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
        [*SHORT, "--config.networks=('resnet8','resnet8')", "--config.networks=('resnet9',)"],
        r"config.networks: must be a tuple of at least two .* but is .'resnet9.,.",
    ),
    'a section': (
        [*SHORT, '--config.loss=3'],
        'config.loss: is a section, not a field; assign one of .*loss.temperature',
    ),
    'wrong ring': ([*SHORT, '--config.ring_order=(1,3)'], r'config.ring_order: .*but is \(1, 3\)'),
    'images of many sizes': (
        ['--config=configs/imagenet.py', '--config.data.image_size=0'],
        'config.data.image_size: the images of tfds:imagenet2012 have many sizes; give the one',
    ),
    'a mean that is missing': (
        ['--config=configs/digits.py', '--config.data.image_size=8', '--mode=prepare'],
        'config.data.mean: must be given, like config.data.std, where images are cropped',
    ),
    'a mean of other channels': (
        ['--config=configs/imagenet.py', '--config.data.mean=(0.5,)', '--mode=describe'],
        'config.data.mean: 1 numbers are given for images of 3 channels; give mean and std',
    ),
    'crops that cannot lie on the device': (
        ['--config=configs/imagenet.py', '--config.data.placement=device', '--mode=describe'],
        "config.data.placement: must be 'stream' or 'auto' with config.data.image_size=224",
    ),
    'a split that is misspelt': (
        ['--config=configs/imagenet.py', '--config.data.train_split=train[:90%', '--mode=prepare'],
        "config.data.train_split: must be a split as 'train.:90%.' .*, but is 'train.:90%",
    ),
    'a size that is not known yet': (
        ['--config=configs/imagenet.py', '--config.data.test_split=foo', '--mode=describe'],
        'imagenet2012, or of the splits that config.data.train_split and test_split name',
    ),
    'no manual_dir': (
        ['--config=configs/imagenet.py', '--config.data.manual_dir=/nope', '--mode=prepare'],
        'config.data.manual_dir: there is no directory /nope',
    ),
    'no archives': (
        ['--config=configs/imagenet.py', '--config.data.data_dir={small}'],
        'imagenet2012 is not prepared in .* put ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar',
    ),
    'networks that cannot be spread': (
        ['--config=configs/digits.py:resnet8,resnet14,resnet8,resnet20', '--config.mesh.peer=2'],
        'config.mesh.peer: .* network 1 is resnet8 .*: 2 .resnet14., 4 .resnet20.;',
    ),
    'peers that do not divide': (
        ['--config=configs/digits.py:resnet8,resnet8,resnet8', '--config.mesh.peer=2'],
        'config.mesh.peer: must be a divisor of the 3 networks, but is 2',
    ),
    'more devices than there are': (
        [*SHORT, '--config.mesh.data=64'],
        'config.mesh: peer x data is 1 x 64, but there are . devices, of which at most . can',
    ),
    'more peers than devices': (
        ['--config=configs/digits.py:' + ','.join(['resnet8'] * 16), '--config.mesh.peer=16'],
        'config.mesh: peer x data is 16 x 1, but there are . devices',
    ),
    'no peer': ([*SHORT, '--config.mesh.peer=0'], 'config.mesh.peer: must be at least 1'),
    'peers under pmap': (
        [*SHORT, '--config.mesh.peer=2', '--config.mapping=pmap'],
        "config.mapping: 'pmap' maps over one axis",
    ),
    'unknown dtype': (
        [*SHORT, '--config.dtype=float16'],
        "config.dtype: must be one of float32, bfloat16, but is 'float16'",
    ),
    'unknown statistics': (
        [*SHORT, '--config.batch_statistics=none'],
        'config.batch_statistics: must be one of global, local',
    ),
    'half of a cluster': ([*SHORT, '--num_processes=2'], '--coordinator_address: missing'),
    'a process too many': (
        [*SHORT, '--coordinator_address=localhost:1', '--num_processes=2', '--process_id=2'],
        '--process_id: must be in 0 .. 1, as --num_processes is 2, but is 2',
    ),
    'no port': (
        [*SHORT, '--coordinator_address=localhost', '--num_processes=2', '--process_id=0'],
        '--coordinator_address: must be HOST:PORT, .* is localhost',
    ),
    'no such port': (
        [*SHORT, '--coordinator_address=a:99999', '--num_processes=2', '--process_id=1'],
        '--coordinator_address: must be HOST:PORT, .* is a:99999',
    ),
    'a plan under pmap': (
        [*SHORT, '--mode=plan', '--config.mapping=pmap'],
        "config.mapping: a plan is of 'shard_map'",
    ),
    'no such topology': (
        [*SHORT, '--mode=plan', '--topology=v5e-17'],
        '--topology: there is no v5e-17; there are v5e-1, v5e-4',
    ),
    'a topology to train on': (
        [*SHORT, '--topology=v5e-16'],
        '--topology: v5e-16 is only for --mode plan',
    ),
    'a batch to search and train': (
        [*SHORT, '--largest_batch'],
        '--largest_batch: True is only for --mode plan',
    ),
    'processes that plan': (
        [*SHORT, '--mode=plan', '--num_processes=2'],
        '--num_processes: 2 is only for --mode train or eval, not for --mode plan',
    ),
    'a step to plan': (
        [*SHORT, '--mode=plan', '--step=3'],
        '--step: 3 is only for --mode train or eval or predict or export, not for --mode plan',
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
    'eval of nothing': (
        [*SHORT, '--mode=eval', '--workdir=/nonexistent/run'],
        '/nonexistent/run holds no run',
    ),
    'small images': (
        ['--config=configs/digits.py', '--config.dataset=idx:{small}'],
        'images of 4x4 are too small for "resnet8"',
    ),
    'a directory for a config': (['--config=configs'], '--config: '),
    'truth value for a number': (
        ['--config=configs/digits.py', '--config.epochs=True'],
        "config.epochs: must be a whole number, but is 'True'",
    ),
    'fraction for a whole number': (
        ['--config=configs/digits.py', '--config.batch_size=6.4'],
        "config.batch_size: must be a whole number, but is '6.4'",
    ),
    'number for a truth value': ([*SHORT, '--config.data.flip=2'], 'config.data.flip: '),
    'no number': ([*SHORT, '--config.loss.temperature=nan'], 'must be a number, but is nan'),
    'too small a number': ([*SHORT, '--config.loss.temperature=1e-300'], 'loss.temperature: must'),
    'negative seed': ([*SHORT, '--config.seed=-1'], 'config.seed: must be in 0 .. 4294967295'),
    'no tuple': ([*SHORT, '--config.networks=resnet8'], 'config.networks: must be a tuple'),
    'no tuple of steps': ([*SHORT, '--config.ring_order=2'], 'config.ring_order: '),
    'no code': ([*SHORT, "--config.networks=__import__('os')"], 'config.networks: must be a tuple'),
    'unknown choice': ([*SHORT, '--config.on_nonfinite=ignore'], 'on_nonfinite: .* stop, skip'),
    'unknown schedule': ([*SHORT, '--config.logit.schedule=cosin'], 'constant, steps, cosine'),
    'no checkpoint': ([*SHORT, '--config.checkpoint.keep=0'], 'checkpoint.keep: .*at least 1'),
    'nearest field': (
        [*SHORT, '--config.checkpoint.every_step=3'],
        'did you mean "checkpoint.every_steps"',
    ),
    'old name of a field': (
        [*SHORT, '--config.keep_checkpoints=3'],
        'config.keep_checkpoints: there',
    ),
    'too many steps': (
        ['--config=configs/digits.py', '--config.epochs=10000000000'],
        'config.epochs: .*steps.*at most',
    ),
    'too large a batch': (
        [*SHORT, '--config.batch_size=5000'],
        'config.batch_size: must be at most 256, the number of training images with '
        'config.data.validation_fraction=0.1, but is 5000',
    ),
    'too wide a crop': ([*SHORT, '--config.data.pad=8'], 'config.data.pad: must be below 8'),
    'too small a split': (
        ['--config=configs/digits.py', '--config.data.validation_fraction=1e-9'],
        'validation_fraction: 1e-09 of 1438 training images of digits is no image',
    ),
    'too many images': (
        ['--config=configs/digits.py', '--config.data.train_examples=2000'],
        'config.data.train_examples: must be at most 1438',
    ),
    'no kind of data set': (
        [*SHORT, '--config.dataset=cifar10'],
        'there is no source .cifar10.*tfds:cifar10',
    ),
    'no directory of images': (
        [*IDX[:2], '--config.dataset=idx:/nonexistent'],
        'there is no directory',
    ),
    'an empty directory of images': (
        [*IDX[:2], '--config.dataset=idx:{small}/set_aside'],
        'no file .*gz',
    ),
    'no such TFDS set': ([*IDX[:2], '--config.dataset=tfds:cifar1000'], 'did you mean "cifar100"'),
    'a TFDS set without labels': (
        [*IDX[:2], '--config.dataset=tfds:celeb_a'],
        'tfds:celeb_a has no .image, label. pair to learn from',
    ),
    'a TFDS set without images': (
        [*IDX[:2], '--config.dataset=tfds:imdb_reviews'],
        'tfds:imdb_reviews is not an image-classification set',
    ),
    'a TFDS set that is not here': (
        [*IDX[:2], '--config.dataset=tfds:cifar10', '--config.data.data_dir={small}/tfds'],
        'tfds:cifar10 is not prepared in .*put cifar-10-binary.tar.gz into a directory',
    ),
    'images cut': (IDX, 'images-idx3-ubyte.gz cannot be read as gzip', damaged_idx('cut')),
    'images no gzip': (IDX, 'cannot be read as gzip .Not a gzipped', damaged_idx('no gzip')),
    'images of wrong magic': (IDX, 'starts with 00000d03', damaged_idx('magic')),
    'images too few': (IDX, 'announces 80x4x4 bytes but holds 1264', damaged_idx('too few')),
    'images too many': (IDX, 'announces 80x4x4 bytes but holds more', damaged_idx('too many')),
    'images that claim all memory': (
        IDX,
        'announces 4294967295x65535x65535 bytes but holds 1280',
        damaged_idx('claims'),
    ),
    'unequal lengths': (IDX, 'has 80 images but .* has 79 labels', damaged_idx('lengths')),
    'label out of range': (
        IDX,
        'the test images must have labels in 0 .. 3, but one is 9',
        damaged_idx('label'),
    ),
    'eval of nothing yet': ([*RUN, '--mode=eval', '--workdir={small}'], 'holds no run'),
    'eval of another step': (
        [*RUN, '--mode=eval', '--step=3'],
        '--step: .* step 3 .*there are .*16, 20, 24',
    ),
    'training from another step': ([*RUN, '--step=7'], '--step: there is no checkpoint of step 7'),
    'training from a step of nothing': (
        [*SHORT, '--step=7', '--workdir={small}/new'],
        'new holds no run',
    ),
    'eval of another config': (
        [*RUN, '--mode=eval', '--config.seed=5'],
        r'holds a run with another config \(seed: 0 -> 5\)',
    ),
    'another config': ([*RUN, '--config.data.pad=2'], 'data.pad: 1 -> 2'),
    'another cohort': (
        [*RUN, "--config.networks=('tiny-8-2','tiny-6-2')"],
        r"networks: \['tiny-8-2', 'tiny-8-2'\] -> \['tiny-8-2', 'tiny-6-2'\]",
    ),
    'checkpoints cut': (RUN, 'no checkpoint can be used: .*has no readable record', cut_records),
    'checkpoints flipped': (RUN, 'no checkpoint can be used: .*was altered', flip_files),
    'checkpoints in pieces': (RUN, 'no checkpoint can be used: .*is missing', remove_arrays),
    'checkpoint asked for flipped': (
        [*RUN, '--mode=eval', '--step=20'],
        'can be used: 20 is damaged: its file arrays/.*was altered',
        flip_files,
    ),
    'checkpoints of another run': (
        [*RUN, '--config.seed=5'],
        r'24 is of another run \(config.seed: 0 -> 5\)',
        remove('config.json'),
    ),
    'checkpoints gone': (RUN, 'of this run, which has begun, are gone', remove('checkpoints/')),
    'config.json cut': (RUN, 'config.json cannot be read', replace('config.json', '{{"a')),
    'config.json of something': (RUN, 'it is not an object', replace('config.json', '[1]')),
    'a workdir in the cloud': ([*SHORT, '--workdir=gs://bucket/run'], '--workdir: gs://.* address'),
    'images in the cloud': (
        [*SHORT, '--config.dataset=folder:s3://b'],
        'dataset: s3://b is an addr',
    ),
    'a TFDS set in the cloud': (
        [*SHORT, '--config.dataset=tfds:mnist', '--config.data.data_dir=gs://b'],
        'data_dir: gs://b is an address',
    ),
    'a file for a workdir': ([*SHORT, '--workdir={small}/text.py'], 'text.py is a file; name a'),
    'a workdir in a file': ([*SHORT, '--workdir={small}/text.py/run'], 'cannot be used .Not a dir'),
    'a file for checkpoints': (RUN, 'checkpoints: File exists', replace('checkpoints/', 'x')),
    'a directory for metrics.jsonl': (RUN, 'Is a directory', replace('metrics.jsonl', None)),
    'a workdir in use': (RUN, f'is in use by process {os.getpid()} on ', lock),
    'batch that devices cannot share': (
        ['--config=configs/digits.py', '--config.batch_size=60'],
        'config.batch_size: must be a multiple of 8 .the number of .*, but is 60; nearest: 64',
    ),
    'evaluation batch that devices cannot share': (
        ['--config=configs/digits.py', '--config.eval_batch_size=4'],
        'config.eval_batch_size: must be a multiple of 8 .the number.*but is 4; nearest: 8',
    ),
    'no step': ([*RUN, '--mode=eval', '--step=first'], "--step: .*'best', but is 'first'"),
    'best of a run that trains': ([*RUN, '--step=best'], "--step: .*from 0 on, but is 'best'"),
    'negative step': ([*RUN, '--mode=eval', '--step=-1'], 'step'),
    'a step to describe': ([*SHORT, '--mode=describe', '--step=3'], '--step: 3 is only for'),
    'export to nothing': ([*RUN, '--mode=export'], '--format: is missing; give one of saf'),
    'a run that would be another': (SHORT, 'JAX_ENABLE_X64: .*unset it'),
    'no truth value for a flag': ([*SHORT, '--debug=perhaps'], 'debug'),
}


@pytest.mark.parametrize('name', BAD_COMMANDS)
def test_bad_input_gives_one_message(name, tmp_path, forked, trained):
    arguments, message, *prepare = BAD_COMMANDS[name]
    for prefix in ('train', 't10k'):
        images = struct.pack('>4I', 2051, 80, 4, 4) + bytes(80 * 16)
        labels = struct.pack('>2I', 2049, 80) + bytes(i % 4 for i in range(80))
        (tmp_path / f'{prefix}-images-idx3-ubyte.gz').write_bytes(gzip.compress(images))
        (tmp_path / f'{prefix}-labels-idx1-ubyte.gz').write_bytes(gzip.compress(labels))
    for file, text in (
        ('broken', 'def get_config(:'),
        ('failing', 'def get_config():\n    return {}["x"]'),
        ('ending', 'import sys\n\n\ndef get_config():\n    sys.exit("no luck")'),
        (
            'frozen',
            'import ml_collections\n\n\ndef get_config():\n'
            '    return ml_collections.FrozenConfigDict({})',
        ),
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
    (tmp_path / 'set_aside').mkdir()
    if RUN[-1] in arguments:
        shutil.copytree(trained[0], tmp_path / 'run')
    for function in prepare:
        function(tmp_path)
    before = contents(tmp_path / 'run')
    code, output, errors = forked(
        [argument.format(small=tmp_path) for argument in arguments],
        forks.environment(8 if 'devices' in name else 1)
        | ({'JAX_ENABLE_X64': '1'} if 'would be another' in name else {}),
    )
    assert code == 1, output
    *warnings, line = errors.splitlines()
    assert line.startswith('error: ')
    assert not warnings or name == 'no return'  # there ml_collections warns too
    assert re.search(message, line), line
    # Nothing that is on the disk is lost by it.
    assert before.items() <= contents(tmp_path / 'run').items()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_there_are_enough_bad_commands():
    assert len(BAD_COMMANDS) >= 60


def test_a_platform_that_is_not_there_is_refused():
    # Not forked: JAX reads this variable when it is imported.
    process = start('/nonexistent/run', JAX_PLATFORMS='quantum')
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch('error: .*quantum.*JAX_PLATFORMS.*\n', errors), errors


def test_a_disk_without_room_is_told_before_any_step(small_disk, forked):
    folder, _ = small_disk
    code, output, errors = forked(['--config=configs/digits.py', f'--workdir={folder}/run'])
    assert code == 1
    assert re.fullmatch('error: .*No space left.*are needed, .*are free.*make room.*\n', errors)
    assert ' steps, on ' not in output


def test_only_debug_shows_a_traceback(forked):
    arguments = [*SHORT, '--config.method=akd']
    code, _, errors = forked(arguments)
    assert (code, 'Traceback' in errors) == (1, False)
    code, _, errors = forked([*arguments, '--debug'])
    assert code != 0
    assert 'Traceback' in errors
    assert 'UserError' in errors


# What libraries do: a thread, and a callback out of which nothing can be raised, fail.
FAILING = """
import threading
from afkd_jax import cli

class Callback:
    def __del__(self):
        raise {error}

cli._hide_tracebacks()
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
Callback()
print('went on')
"""


@pytest.mark.parametrize(
    ('error', 'code', 'output', 'errors'),
    [
        ('ValueError', 0, 'went on\n', ''),
        ('KeyboardInterrupt', 130, '', 'error: interrupted; what was written before is intact\n'),
    ],
)
def test_libraries_print_no_traceback_but_swallow_no_ctrl_c(error, code, output, errors):
    process = subprocess.run(
        [sys.executable, '-c', FAILING.format(error=error)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout, process.stderr) == (code, output, errors)


@pytest.mark.parametrize(
    'arguments', [['--help'], ['--mode=describe'], ['--mode=plan', '--config.method=vanilla']]
)
def test_output_that_nobody_reads_is_no_error(arguments):
    arguments = ['--config=tests/tiny.py', *arguments]
    assert forks.Launch(arguments, ENVIRONMENT, unread=True).end() == [141, '', '']


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8'])
def test_what_an_output_cannot_encode_is_escaped(encoding, monkeypatch, tmp_path):
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, 'stdout', output)
    monkeypatch.setattr(sys, 'stderr', None)  # closed
    cli._prepare_outputs()
    print('of no stream', file=sys.stderr)
    sys.stderr.close()
    for log in (print, console.log):
        log('\xe9 \udcff')  # a file name that is no UTF-8 has such a character
    with console.redirected(tmp_path / 'log'):
        console.log('\xe9 \udcff')
    output.flush()
    shown = rb'\xe9' if encoding == 'ascii' else '\xe9'.encode()
    assert output.buffer.getvalue() == 2 * (shown + b' \\udcff\n')
    assert (tmp_path / 'log').read_bytes() == '\xe9 \\udcff\n'.encode()


def test_a_broken_pipe_between_processes_is_an_error():
    assert not cli._unread(BrokenPipeError())
    assert cli._message(BrokenPipeError(32, 'Broken pipe'))[1] == 1


def test_a_name_that_the_locale_cannot_encode_is_named():
    message, code = cli._message(UnicodeEncodeError('ascii', 'é/seed=0', 0, 1, 'of a study'))
    assert (message, code) == ('é/seed=0 is not valid ascii; use a UTF-8 locale', 1)


@pytest.mark.parametrize(
    ('error', 'pattern', 'code'),
    [
        (
            ZeroDivisionError('a\nb'),
            r'a fault of this program \(ZeroDivisionError: a\); .*--debug',
            70,
        ),
        (
            RuntimeError('RESOURCE_EXHAUSTED: 9G'),
            'memory is exhausted .*lower config.batch_size',
            1,
        ),
        (MemoryError(), 'memory is exhausted', 1),
        (OSError(28, 'No space left on device', '/x'), '/x: No space left on device; mend', 1),
        (OSError('odd'), 'the disk: odd; mend', 1),
        (UserError('as it is'), '^as it is$', 1),
    ],
)
def test_every_error_becomes_one_line(error, pattern, code):
    message, given = cli._message(error)
    assert re.search(pattern, message), message
    assert given == code


@pytest.mark.slow
def test_two_processes_make_the_same_run_whatever_is_written_meanwhile(trained, tmp_path):
    with kills.start(tmp_path, ENVIRONMENT, *kills.OFTEN) as process:
        assert ' steps, on ' in process.stdout.readline()
        process.stdout.close()  # as after `| head -1`: nobody reads its words any more
        assert process.stderr.read() == ''
    assert process.returncode == 0
    assert kills.fingerprint(tmp_path) == kills.fingerprint(trained[0])
    assert kills.logged(tmp_path) == kills.logged(trained[0])
