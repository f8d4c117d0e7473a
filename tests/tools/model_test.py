"""A trained network by itself: the predictions of the run's evaluation, without its images."""

import csv
import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import forks
import jax
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

import afkd_jax
from afkd_jax import cli
from afkd_jax.checkpoints import artefact, weights
from afkd_jax.checkpoints.store import Checkpoints
from afkd_jax.command import Command, Options
from afkd_jax.data import dataset
from afkd_jax.devices import mesh
from afkd_jax.devices.signals import Interrupt
from afkd_jax.errors import UserError
from afkd_jax.report.console import console
from afkd_jax.tools import export, model, predict
from afkd_jax.training import evaluate, loop
from afkd_jax.training import run as run_lib

pytestmark = pytest.mark.usefixtures('compiled_once')
MIXED = ('tiny-8-2', 'tiny-4-1', 'tiny-8-2')


def trained(tmp_path_factory, devices, **fields):
    fields = {'epochs': 2, 'batch_size': 32, 'data__train_examples': 178} | fields
    config, workdir = tiny_config(**fields), tmp_path_factory.mktemp('run')
    with pytest.MonkeyPatch.context() as patch, Interrupt() as interrupt:
        patch.setattr(mesh, 'available', lambda: jax.devices()[:devices])
        assert loop.train(config, workdir, None, interrupt)
        run = run_lib.prepare(config)
        evaluator, evaluations = evaluate.Evaluator(run), {}
        with Checkpoints(workdir, run.origin()) as checkpoints:
            for step in (5, 10):
                state = checkpoints.restore(run.abstract(), step).snapshot.state
                evaluations[step] = evaluator(state.networks, 'test')
    return config, workdir, evaluations


@pytest.fixture(scope='module')
def stacked(tmp_path_factory):
    """(config, workdir, step -> evaluation on test) of two equal networks, on two devices."""
    return trained(tmp_path_factory, 2, mesh__peer=2, method='kd_ring')


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
    """Likewise, of three networks with transfer layers and discriminators, streamed."""
    return trained(tmp_path_factory, 1, networks=MIXED, data__placement='stream')


def images_of(config, split):
    data = dataset.dataset(config)
    pixels, labels = zip(*(data[i] for i in data.info.indices(split)), strict=True)
    return np.stack(pixels), np.array(labels)


@pytest.mark.parametrize('run', ['stacked', pytest.param('mixed', marks=pytest.mark.slow)])
@pytest.mark.parametrize('step', ['last', 'best', 5])
def test_predictions_are_those_of_the_runs_evaluation(run, step, request):
    config, workdir, evaluations = request.getfixturevalue(run)
    pixels, labels = images_of(config, 'test')
    for k, network in enumerate([*range(1, len(config.networks) + 1), 'ensemble']):
        loaded = model.load(workdir, network, step)
        probabilities = loaded.predict(pixels)
        assert probabilities.shape == (359, 10)
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
        expected = evaluations[loaded.step]
        accuracy = 100 * (probabilities.argmax(1) == labels).mean()
        assert accuracy == pytest.approx(expected.accuracy[k])
        entropy = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
        assert entropy == pytest.approx(expected.cross_entropy[k], rel=1e-4)


@pytest.fixture(scope='module')
def jpegs(tmp_path_factory):
    """A folder of colour JPEGs of many sizes: 40 to train on and 24 to test, of three classes."""
    folder, rng = tmp_path_factory.mktemp('jpegs'), np.random.default_rng(0)
    for split, count in (('train', 40), ('test', 24)):
        for i in range(count):
            path = folder / split / 'abc'[i % 3] / f'{i:02d}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = rng.integers(10, 40, 2)
            pixels = rng.integers(0, 200, (height, width, 3), np.uint8)
            pixels[..., i % 3] += 55
            Image.fromarray(pixels).save(path, quality=90)
    return folder


def test_predictions_of_files_are_those_of_the_evaluation_also_cropped_and_in_bfloat16(
    jpegs, tmp_path_factory
):
    fields = {'dataset': f'folder:{jpegs}', 'dtype': 'bfloat16', 'method': 'kd_ring'}
    fields |= {'batch_size': 8, 'eval_batch_size': 16, 'networks': ('tiny-8-2', 'tiny-4-1')}
    fields |= {'data__train_examples': 0, 'data__validation_fraction': 0.0, 'data__pad': 0}
    fields |= {'data__image_size': 8, 'data__eval_resize': 9}
    fields |= {'data__mean': (0.4, 0.5, 0.6), 'data__std': (0.2, 0.25, 0.3)}
    _, workdir, evaluations = trained(tmp_path_factory, 1, **fields)
    files = sorted((jpegs / 'test').glob('*/*.jpg'))
    labels = np.array(['abc'.index(path.parent.name) for path in files])
    for k, network in ((1, 2), (2, 'ensemble')):
        probabilities = model.load(workdir, network).predict(files)
        accuracy = 100 * (probabilities.argmax(1) == labels).mean()
        assert accuracy == pytest.approx(evaluations[10].accuracy[k])
        entropy = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
        # Other batch sizes round otherwise: 4e-3 of an activation. In float32 it is 1e-6.
        assert entropy == pytest.approx(evaluations[10].cross_entropy[k], rel=1e-3)


def test_it_needs_neither_the_images_nor_the_other_networks(mixed, monkeypatch):
    workdir = mixed[1]
    read = []
    real = weights.partial.ocp.Checkpointer.restore

    def restore(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        read.append(found[0]['networks'])
        return found

    monkeypatch.setattr(weights.partial.ocp.Checkpointer, 'restore', restore)
    monkeypatch.setattr(dataset, 'dataset', lambda config: pytest.fail('the images were read'))
    loaded = afkd_jax.load(workdir, network=2)
    assert loaded.name == '2 tiny-4-1'
    assert loaded.classes == tuple('0123456789')
    assert set(loaded.variables['params']) == {'trunk', 'head'}
    (networks,) = read
    assert [set(network['params']) for network in networks] == [
        {'head'},
        {'trunk', 'head'},
        {'head'},
    ]
    assert 'opt' not in networks[1]


def test_a_feature_map_is_the_trunks(mixed):
    config, workdir, _ = mixed
    pixels, _ = images_of(config, 'validation')
    loaded = model.load(workdir, 2)
    assert loaded.features(pixels[:3]).shape == (3, 8, 8, 4)
    with pytest.raises(UserError, match='ensemble has several feature maps'):
        model.load(workdir, 'ensemble').features(pixels[:3])


def test_batches_of_any_size_are_compiled_once_per_shape(stacked):
    config, workdir, _ = stacked
    pixels = np.repeat(images_of(config, 'test')[0], 2, axis=0)
    loaded = model.load(workdir)
    whole = loaded.predict(pixels)
    assert loaded._predict._cache_size() == 1
    np.testing.assert_allclose(loaded.predict(pixels[:1]), whole[:1], rtol=1e-4, atol=1e-6)
    assert loaded._predict._cache_size() == 2


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'network': 3}, r"network: must be in 1 .. 2, or 'ensemble', but is 3"),
        ({'network': 0}, 'but is 0'),
        ({'network': 'all'}, "but is 'all'"),
        ({'step': 7}, r'there is no whole checkpoint 7 .*; there are 0, 5, 10'),
    ],
)
def test_what_is_not_there_is_named(arguments, message, stacked):
    with pytest.raises(UserError, match=message):
        model.load(stacked[1], **arguments)


def test_a_directory_without_a_run_or_of_an_older_version(stacked, tmp_path):
    with pytest.raises(UserError, match=r'there is no directory .*nowhere'):
        model.load(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='holds no run'):
        model.load(tmp_path)
    old = tmp_path / 'old'
    shutil.copytree(stacked[1], old)
    (old / 'images.json').unlink()
    with pytest.raises(UserError, match=r'images.json is missing, as in runs of older versions'):
        model.load(old)
    config = json.loads((old / 'config.json').read_text())
    del config['loss']['map_weight']
    (old / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match=r'config.loss.map_weight: missing.*another version'):
        model.load(old)


def test_the_first_step_can_be_exported_and_predicted(stacked, tmp_path, capsys):
    config, workdir, _ = stacked
    write_images(tmp_path, *(part[:3] for part in images_of(config, 'test')))
    given = {'images': (str(tmp_path),), 'output': str(tmp_path / 'out.csv'), 'step': '0'}
    assert predict.main(options('predict', workdir, **given), None) == 0
    assert '1 tiny-8-2 of step 0: 3 images; written to' in capsys.readouterr().out


def test_another_config_beside_the_run_is_refused(stacked, tmp_path):
    (tmp_path / 'image.png').write_bytes(b'')
    command = options('predict', stacked[1], images=(str(tmp_path / 'image.png'),))
    command = dataclasses.replace(command, config=command.config.replace(seed=5))
    with pytest.raises(UserError, match=r'another config \(seed: 0 -> 5\)'):
        predict.main(command, None)


def test_files_of_which_none_is_an_image_are_an_error(stacked, tmp_path):
    (tmp_path / 'image.png').write_bytes(b'')
    command = options('predict', stacked[1], images=(str(tmp_path),), output=str(tmp_path / 'a'))
    with pytest.raises(UserError, match='none of 1 files can be read'):
        predict.main(command, None)
    assert {path.name for path in tmp_path.iterdir()} == {'image.png'}


def test_a_refused_resume_leaves_the_description_of_the_images(stacked, tmp_path, monkeypatch):
    workdir = tmp_path / 'run'
    shutil.copytree(stacked[1], workdir)
    (workdir / 'summary.json').unlink()
    before = (workdir / 'images.json').read_text()
    real = dataset.dataset

    def other(config):
        found = real(config)
        images = dataclasses.replace(found.test.examples, pixels=found.test.examples.pixels // 2)
        test = found.test._replace(examples=images)
        return dataclasses.replace(found, test=test)

    monkeypatch.setattr(dataset, 'dataset', other)
    monkeypatch.setattr(mesh, 'available', lambda: jax.devices()[:2])
    with pytest.raises(UserError, match='is of another run'), Interrupt() as interrupt:
        loop.train(stacked[0], workdir, None, interrupt)
    assert (workdir / 'images.json').read_text() == before


def test_evaluation_describes_the_images_of_an_older_run(stacked, tmp_path, monkeypatch):
    workdir = tmp_path / 'run'
    shutil.copytree(stacked[1], workdir)
    before = (workdir / 'images.json').read_text()
    (workdir / 'images.json').unlink()
    monkeypatch.setattr(mesh, 'available', lambda: jax.devices()[:2])
    result = evaluate.evaluate(stacked[0], workdir, 'best')
    assert result['step'] == model.load(workdir, 'ensemble', 'best').step
    assert (workdir / 'images.json').read_text() == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(stacked, tmp_path, capsys):
    workdir = tmp_path / 'run'
    shutil.copytree(stacked[1], workdir)
    (workdir / 'checkpoints/10/record.json').write_text('{}')
    assert model.load(workdir).step == 5
    assert 'checkpoints/10: this checkpoint has no readable record' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'no whole checkpoint 10 .*10 has no readable record'):
        model.load(workdir, step=10)
    (workdir / 'checkpoints/5').rename(workdir / 'checkpoints/7')
    with pytest.raises(UserError, match=r'no whole checkpoint 7 .*7 is that of step 5'):
        model.load(workdir, step=7)


def test_wrong_images_are_rejected(stacked):
    loaded = model.load(stacked[1])
    with pytest.raises(UserError, match='none are given'):
        loaded.predict([])
    for images in (np.zeros((2, 8, 8, 1), np.float32), np.zeros((2, 8, 8, 3), np.uint8)):
        with pytest.raises(UserError, match=r'must be uint8 \[B, 8, 8, 1\], but are'):
            loaded.predict(images)


def write_images(folder, pixels, labels):
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = folder / str(label) / f'{i:03d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)


def options(mode, workdir, **fields):
    values = dict.fromkeys(('workdir', 'step', 'coordinator_address', 'num_processes'))
    values |= dict.fromkeys(('process_id', 'topology', 'sweep'))
    values |= {'mode': mode, 'largest_batch': False, 'debug': False} | fields
    return Command(artefact.read_config(workdir), Options(**values), workdir)


def test_files_are_predicted_as_arrays_are_and_the_csv_holds_them(
    stacked, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(console, 'stderr', True)  # as --json does
    config, workdir, _ = stacked
    pixels, labels = images_of(config, 'validation')
    write_images(tmp_path / 'images', pixels, labels)
    (tmp_path / 'images' / 'broken.png').write_bytes(b'no image')
    (tmp_path / 'images' / 'notes.txt').write_text('ignored')
    output = tmp_path / 'out.csv'
    images, given = (str(tmp_path / 'images'),), {'network': '2', 'output': str(output)}
    assert predict.main(options('predict', workdir, images=images, **given), None) == 0
    printed, words = capsys.readouterr()
    assert 'broken.png: cannot be read as an image' in words
    assert '1 files could not be read' in words
    result = json.loads(printed)
    with output.open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert result['images'] == len(rows) == len(pixels)
    probabilities = model.load(workdir, 2).predict(pixels)
    by_file = {int(row['file'][-7:-4]): row for row in rows}
    for i, expected in enumerate(probabilities):
        best = np.argsort(-expected, kind='stable')
        assert by_file[i]['class'] == str(best[0])
        assert float(by_file[i]['probability']) == pytest.approx(expected[best[0]], abs=2e-6)
        assert by_file[i]['class_5'] == str(best[4])
    accuracy = 100 * (probabilities.argmax(1) == labels).mean()
    assert result['accuracy'] == pytest.approx(accuracy)
    with pytest.raises(UserError, match=r'--output: .*out.csv exists'):
        predict.main(options('predict', workdir, images=images, **given), None)


def test_large_colour_images_are_scaled_and_cropped_to_the_centre(stacked, tmp_path):
    wide = np.zeros((80, 240, 3), np.uint8)
    wide[:, 80:160] = 0, 0, 200  # blue, whose luma is 0.114
    Image.fromarray(wide).save(tmp_path / 'wide.png')
    image = model.load(stacked[1]).read(tmp_path / 'wide.png')
    np.testing.assert_array_equal(image[:, 1:-1], np.full((8, 6, 1), 23))


@pytest.mark.parametrize('names', [[], [''], ['nowhere'], ['.']])
def test_no_images_are_an_error(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='--images: (there is no|name files)'):
        predict.image_files(names)


LOAD_SAFETENSORS = """
import json, sys
import numpy as np
from safetensors.numpy import load_file
tensors = load_file(sys.argv[1])
facts = json.load(open(sys.argv[1] + '.json'))
assert not any(name.startswith(('afkd', 'jax', 'flax')) for name in sys.modules)
print(json.dumps({n: [str(t.dtype), list(t.shape), float(t.sum())] for n, t in tensors.items()}))
print(json.dumps(facts))
"""
RUN_STABLEHLO = """
import sys
import jax, numpy as np
exported = jax.export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))
assert set(exported.platforms) == {'cpu', 'cuda', 'tpu'}
images = np.load(sys.argv[2])
for count in (1, 7, len(images)):
    np.save(f'{sys.argv[3]}-{count}.npy', exported.call(images[:count]))
assert not any(name.startswith('afkd') for name in sys.modules)
"""


def exported(workdir, tmp_path, form, **fields):
    output = tmp_path / f'network.{form}'
    command = options('export', workdir, format=form, output=str(output), **fields)
    assert export.main(command, None) == 0
    return output


def python(program, *arguments):
    command = [sys.executable, '-c', program, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, cwd='/', env=forks.environment()
    ).stdout


def test_safetensors_hold_the_parameters_under_their_names(mixed, tmp_path):
    pytest.importorskip('safetensors')
    output = exported(mixed[1], tmp_path, 'safetensors', network='2')
    tensors, facts = map(json.loads, python(LOAD_SAFETENSORS, output).splitlines())
    variables = model.load(mixed[1], 2).variables
    flat = {**variables['params'], 'batch_stats': variables['batch_stats']}
    leaves = jax.tree_util.tree_leaves_with_path(flat)
    assert len(leaves) == len(tensors)
    for path, leaf in leaves:
        name = '/'.join(key.key for key in path)
        assert tensors[name] == [
            'float32',
            list(leaf.shape),
            pytest.approx(float(leaf.sum()), rel=1e-5, abs=1e-5),
        ]
    assert facts['architecture'] == ['tiny-4-1']
    assert facts['classes'] == list('0123456789')
    assert len(facts['mean']) == len(facts['std']) == 1


@pytest.mark.parametrize('network', ['1', 'ensemble'])
def test_stablehlo_gives_the_same_probabilities_in_another_process(network, stacked, tmp_path):
    pytest.importorskip('flatbuffers')
    config, workdir, _ = stacked
    pixels, _ = images_of(config, 'validation')
    output = exported(workdir, tmp_path, 'stablehlo', network=network)
    np.save(tmp_path / 'images.npy', pixels)
    python(RUN_STABLEHLO, output, tmp_path / 'images.npy', tmp_path / 'out')
    expected = model.load(workdir, int(network) if network == '1' else network).predict(pixels)
    for count in (1, 7, len(pixels)):
        found = np.load(tmp_path / f'out-{count}.npy')
        np.testing.assert_allclose(found, expected[:count], rtol=1e-5, atol=1e-6)


def test_an_ensemble_is_no_safetensors_file(stacked, tmp_path):
    with pytest.raises(UserError, match='safetensors holds one network'):
        exported(stacked[1], tmp_path, 'safetensors', network='ensemble')


def test_the_modes_that_read_a_run_take_its_config():
    reads = {name for name, mode in cli.MODES.items() if mode.reads_run}
    assert reads == {'eval', 'predict', 'export', 'describe'}


def test_the_documented_example_runs(stacked, tmp_path, monkeypatch, capsys):
    page = (pathlib.Path(__file__).parents[2] / 'docs' / 'using.md').read_text()
    block = re.search(r'```python\n(import afkd_jax.*?)```', page, re.DOTALL)
    assert block
    pixels, labels = images_of(stacked[0], 'test')
    (tmp_path / 'runs').mkdir()
    (tmp_path / 'runs' / 'digits').symlink_to(stacked[1])
    for name, digit in (('three', 3), ('seven', 7)):
        Image.fromarray(pixels[labels == digit][0, ..., 0]).save(tmp_path / f'{name}.png')
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(block[1], found)
    assert found['probabilities'].shape == (2, 10)
    assert found['maps'].shape == (1, 4, 4, 8)
    assert capsys.readouterr().out.startswith('1 tiny-8-2 ')


def test_a_run_alone_is_enough_for_the_modes_that_read_it(stacked):
    command = ['--mode=describe', f'--workdir={stacked[1]}']
    code, _, errors = forks.run(command)
    assert code == 1  # its networks are registered in the tests only
    assert 'config.networks: there is no network "tiny-8-2"' in errors
    code, _, errors = forks.run(['--mode=train', f'--workdir={stacked[1]}'])
    assert (code, '--config: name a config file' in errors) == (1, True)
    code, _, errors = forks.run(['--mode=eval', '--workdir=/nowhere'])
    assert (code, 'there is no directory /nowhere' in errors) == (1, True)
