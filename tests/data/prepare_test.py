"""--mode prepare: whole or not at all, from archives on the disk, and again after a kill."""

import gzip
import hashlib
import io
import json
import pathlib
import re
import tarfile
import time
import zipfile
from unittest import mock

import forks
import idx_test
import imagenet_test
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tfds_test
from conftest import tiny_config
from PIL import Image
from tensorflow_datasets.core.shuffle import Shuffler

from afkd_jax.data import dataset as dataset_lib
from afkd_jax.data import decode
from afkd_jax.errors import UserError
from afkd_jax.tools import prepare


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Returns the config of a small CIFAR-100 whose archive lies in manual_dir."""
    _, entry = tfds_test.cifar100_archive(tmp_path, train=30, test=10)
    builder = type(tfds_test.tfds.builder('cifar100', data_dir=tmp_path))
    monkeypatch.setattr(builder, 'url_infos', entry)
    return tfds_test.config('cifar100', tmp_path, data__manual_dir=str(tmp_path))


def test_an_archive_is_prepared_once(cifar, tmp_path):
    lines = []
    result = prepare.prepare(cifar, lines.append)
    json.dumps(result)
    assert (result['train'], result['validation'], result['test']) == (27, 3, 10)
    assert result['num_classes'] == 100
    assert pathlib.Path(result['path']).is_relative_to(tmp_path / 'prepared')
    assert 'is being prepared' in lines[0]
    again = prepare.prepare(cifar, lines.append)
    assert 'is prepared already' in lines[1]
    assert again['fingerprint'] == result['fingerprint']


def test_damaged_files_and_records_are_named(cifar, tmp_path):
    prepare.prepare(cifar, lambda line: None)
    (file,) = (tmp_path / 'prepared').rglob('cifar100-train.array_record*')
    whole = file.read_bytes()
    half = len(whole) // 2
    for content in (whole[: half * 4 // 3], whole[:half] + bytes(half), b''):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f'{file} should have 30 records, but has .*; copy'):
            prepare.prepare(cifar, lambda line: None)
        with pytest.raises(UserError, match=f'record .* of {file}: it cannot be read; copy'):
            dataset_lib.dataset(cifar).load()
    file.write_bytes(whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :])
    dataset = dataset_lib.dataset(cifar)  # the validation split needs all labels
    broken = []
    for index in range(40):
        try:
            dataset[index]
        except decode.DecodeError:
            broken.append(dataset.name(index))
    assert len(broken) == 1
    with pytest.raises(UserError, match=f'{re.escape(broken[0])}: .*config.data.max_corrupt'):
        dataset.load()
    prepare.prepare(cifar, lambda line: None)  # reads the first and last images only
    message = rf'1 of the images of .* is {re.escape(broken[0])} \(it cannot .*; repair'
    with pytest.raises(UserError, match=message):
        prepare.prepare(cifar, lambda line: None, verify=True)


def test_a_copied_directory_needs_no_network(cifar, tmp_path):
    prepare.prepare(cifar, lambda line: None)
    (tmp_path / 'prepared').rename(tmp_path / 'elsewhere')
    copied = cifar.replace(**{'data.data_dir': str(tmp_path / 'elsewhere'), 'data.manual_dir': ''})
    assert len(dataset_lib.dataset(copied).load()) == 40


def test_what_fails_leaves_nothing_half_prepared(cifar, tmp_path, monkeypatch):
    # Like a process that is killed: the folder it was writing stays.
    folder = tmp_path / 'prepared/cifar100'
    rest = folder / 'incomplete.ABCDEF_3.0.2'
    rest.mkdir(parents=True)
    (rest / 'cifar100-train.array_record').write_text('half')
    archive = tmp_path / 'cifar-100-binary.tar.gz'
    data = archive.read_bytes()
    archive.write_bytes(data[:-100])
    with pytest.raises(UserError, match=r'gz has [\d,]+ bytes, but the archive has [\d,]+; get'):
        prepare.prepare(cifar, lambda line: None)
    archive.write_bytes(data[:-100] + bytes(100))
    with pytest.raises(UserError, match='could not be prepared in .*[Cc]hecksum'):
        prepare.prepare(cifar, lambda line: None)
    assert not rest.exists()
    assert not any(folder.glob('*/*.array_record*'))
    archive.write_bytes(data)
    assert prepare.prepare(cifar, lambda line: None)['train'] == 27


def test_a_directory_that_cannot_be_written_is_reported(cifar, tmp_path):
    (tmp_path / 'prepared').write_text('a file')
    with pytest.raises(UserError, match=r'config.data.data_dir: .*prepared.*repair it'):
        prepare.prepare(cifar, lambda line: None)


def test_a_broken_first_image_is_reported(monkeypatch):
    def broken(self, image, channels):
        raise decode.DecodeError('half a file')

    monkeypatch.setattr(decode.View, 'evaluation', broken)
    with pytest.raises(
        UserError, match=r'cannot be decoded, the first is image \d+ .half a file.; repair or'
    ):
        prepare.prepare(tiny_config(), lambda line: None)


def test_launch_prints_words_and_json(forked):
    code, output, errors = forked(['--config=configs/digits.py', '--mode=prepare', '--json'])
    assert code == 0
    assert errors.startswith('digits: 1,294 images to train on, 144 held out, 359 to test')
    result = json.loads(output)
    assert (result['train'], result['validation'], result['test']) == (1294, 144, 359)
    assert result['path'] is None


def prepare_cifar_slowly(config, entry):
    """Is a process that prepares a set with our own writer, and hangs in the middle."""
    type(tfds.builder('cifar100', data_dir=config.data.data_dir)).url_infos = entry
    add_examples, calls = tfds.core.SequentialWriter.add_examples, []

    def slow(self, examples):
        add_examples(self, examples)
        calls.append(1)
        if len(calls) == 2:
            time.sleep(600)

    tfds.core.SequentialWriter.add_examples = slow
    prepare.prepare(config, lambda line: None)


def test_killed_in_our_writer_it_is_not_prepared_and_then_it_is(tmp_path, monkeypatch):
    _, entry = tfds_test.cifar100_archive(tmp_path, train=400, test=10)
    config = tfds_test.config('cifar100', tmp_path, data__manual_dir=str(tmp_path))
    process = forks.CONTEXT.Process(target=prepare_cifar_slowly, args=(config, entry))
    process.start()
    folder = tmp_path / 'prepared/cifar100'
    while not any(folder.glob('incomplete.*/cifar100/*/cifar100-train.array_record*')):
        time.sleep(0.02)
        assert process.is_alive()
    process.kill()
    process.join()
    assert not (folder / '3.0.2').exists()
    monkeypatch.setattr(type(tfds.builder('cifar100', data_dir=tmp_path)), 'url_infos', entry)
    assert prepare.prepare(config, lambda line: None)['train'] == 360
    assert [path.name for path in folder.glob('[!.]*')] == ['3.0.2']


def mnist_archives(folder, name, count):
    """Writes archives in the formats of the MNIST family; returns their checksum entries."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    files = {}
    for train, split in ((True, 'train'), (False, 't10k')):
        split = split if train or name != 'emnist/digits' else 'test'
        for kind, array in (('images-idx3', pixels), ('labels-idx1', labels)):
            part = array if train else array[:5]
            files[f'{split}-{kind}-ubyte.gz'] = gzip.compress(idx_test.idx_bytes(part))
    if name == 'emnist/digits':
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, 'w') as zipped:
            for file, data in files.items():
                zipped.writestr(f'gzip/emnist-digits-{file}', data)
        files = {'gzip.zip': archive.getvalue()}
    entries = {}
    for file, data in files.items():
        (folder / file).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        entry = tfds.download.checksums.UrlInfo(len(data), digest, file)
        entries[f'https://host/{file}'] = entry
    return pixels, labels, entries


@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist', 'kmnist', 'emnist/digits'])
def test_the_mnist_family_is_prepared_and_tfds_reads_it(name, tmp_path, monkeypatch):
    pixels, labels, entries = mnist_archives(tmp_path, name, 30)
    monkeypatch.setattr(type(tfds.builder(name, data_dir=tmp_path)), 'url_infos', entries)
    config = tfds_test.config(name, tmp_path, data__manual_dir=str(tmp_path))
    result = prepare.prepare(config, lambda line: None)
    assert (result['train'], result['test'], result['image_shape']) == (27, 5, (28, 28, 1))
    builder = tfds.builder(name, data_dir=tmp_path / 'prepared')
    assert builder.info.features['label'].num_classes == 10
    source = builder.as_data_source(split='train')
    # In the order of TFDS, which hashes the number of each example with the name of its split.
    shuffler = Shuffler(tmp_path, 'train')
    for number in range(30):
        shuffler.add(number, bytes([number]))
    for example, (_, number) in zip(source, shuffler, strict=True):
        assert example['label'] == labels[number[0]]
        np.testing.assert_array_equal(example['image'][..., 0], pixels[number[0]])


def test_a_set_whose_builder_needs_tensorflow_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr('socket.getaddrinfo', lambda *_: [])
    builder = type(tfds.builder('stl10', data_dir=tmp_path))
    needs = {'side_effect': ImportError("No module named 'tensorflow'")}
    monkeypatch.setattr(builder, '_split_generators', mock.Mock(**needs))
    with pytest.raises(UserError, match=r"No module named 'tensorflow'.*tfds build stl10 --file_f"):
        prepare.prepare(tfds_test.config('stl10', tmp_path), lambda line: None)


def prepare_slowly(data_dir):
    """Is a process that prepares, and hangs in the middle."""
    picture = imagenet_test.picture

    def slow(number):
        if number == 50:
            time.sleep(600)
        return picture(number)

    imagenet_test.picture = slow
    prepare.prepare(imagenet_test.shrunken(data_dir), lambda line: None)


def test_killed_while_it_prepares_it_is_not_prepared_and_then_it_is(tmp_path):
    process = forks.CONTEXT.Process(target=prepare_slowly, args=(tmp_path,))
    process.start()
    folder = tmp_path / 'jpegs_of_many_sizes'
    while not any(folder.glob('incomplete.*')):
        time.sleep(0.02)
        assert process.is_alive()
    process.kill()
    process.join()
    assert any(folder.glob('incomplete.*'))
    assert not (folder / '1.0.0').exists()
    config = imagenet_test.shrunken(tmp_path)
    assert prepare.prepare(config, lambda line: None)['train'] == imagenet_test.TRAIN
    assert [path.name for path in folder.glob('[!.]*')] == ['1.0.0']


def tar_of(files):
    """Returns the bytes of a tar archive of {name: bytes}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def test_imagenet_is_prepared_from_archives_like_its_own(tmp_path, monkeypatch):
    # A tar of one tar per class to train on, one flat tar to test on. The second training image is
    # a PNG by another name and the third a CMYK JPEG, as a few of ImageNet's are.
    picture, synsets = imagenet_test.picture, ('n01440764', 'n01443537')
    image = Image.open(io.BytesIO(picture(3)))
    png, cmyk = io.BytesIO(), io.BytesIO()
    image.save(png, 'PNG')
    image.convert('CMYK').save(cmyk, 'JPEG')
    odd = {'n02105855_2933.JPEG': png.getvalue(), 'n01739381_1309.JPEG': cmyk.getvalue()}
    train = {
        f'{synsets[0]}.tar': tar_of({f'{synsets[0]}_{n}.JPEG': picture(n) for n in range(10)}),
        f'{synsets[1]}.tar': tar_of(odd),
    }
    val = {f'ILSVRC2012_val_{n:08}.JPEG': picture(n) for n in range(1, 7)}
    archives = {'ILSVRC2012_img_train.tar': tar_of(train), 'ILSVRC2012_img_val.tar': tar_of(val)}
    for name, data in archives.items():
        (tmp_path / name).write_bytes(data)
    builder = type(tfds.builder('imagenet2012', data_dir=tmp_path))
    known = {
        f'http://host/{name}': tfds.download.checksums.UrlInfo(len(data), '0', None)
        for name, data in archives.items()
    }
    monkeypatch.setattr(builder, 'url_infos', known)
    config = imagenet_test.shrunken(tmp_path / 'prepared', data__manual_dir=str(tmp_path))
    config = config.replace(dataset='tfds:imagenet2012')
    result = prepare.prepare(config, lambda line: None)
    assert (result['train'], result['test'], result['num_classes']) == (12, 6, 1000)
    dataset = dataset_lib.dataset(config)
    images = [dataset[index] for index in range(12)]
    assert sorted(label for _, label in images) == [0] * 10 + [1] * 2
    assert {*odd.values()} < {image for image, _ in images}
    for image, _ in images:
        assert dataset.view.evaluation(image, 3).shape == (8, 8, 3)

    (tmp_path / 'ILSVRC2012_img_val.tar').write_bytes(b'half')
    config = config.replace(**{'data.data_dir': str(tmp_path / 'again')})
    with pytest.raises(
        UserError, match=r'img_val.tar has 4 bytes, but the archive has [\d,]+; get'
    ):
        prepare.prepare(config, lambda line: None)
