"""--mode prepare: whole or not at all, from archives on the disk, and again after a kill."""

import io
import json
import pathlib
import tarfile
import time

import forks
import imagenet_test
import pytest
import tensorflow_datasets as tfds
import tfds_test
from conftest import tiny_config
from PIL import Image

from afkd_jax.data import dataset as sources
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
    told = []
    result = prepare.prepare(cifar, told.append)
    json.dumps(result)
    assert (result['train'], result['validation'], result['test']) == (27, 3, 10)
    assert result['num_classes'] == 100
    assert pathlib.Path(result['path']).is_relative_to(tmp_path / 'prepared')
    assert 'is being prepared' in told[0]
    again = prepare.prepare(cifar, told.append)
    assert 'is prepared already' in told[1]
    assert again['fingerprint'] == result['fingerprint']


def test_a_copied_directory_needs_no_network(cifar, tmp_path):
    prepare.prepare(cifar, lambda words: None)
    (tmp_path / 'prepared').rename(tmp_path / 'elsewhere')
    copied = cifar.copy_and_resolve_references()
    copied.data.data_dir, copied.data.manual_dir = str(tmp_path / 'elsewhere'), ''
    assert len(sources.load(copied).train) == 27


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
        prepare.prepare(cifar, lambda words: None)
    archive.write_bytes(data[:-100] + bytes(100))
    with pytest.raises(UserError, match='could not be prepared in .*[Cc]hecksum'):
        prepare.prepare(cifar, lambda words: None)
    assert not rest.exists()
    assert not any(folder.glob('*/*.array_record*'))
    archive.write_bytes(data)
    assert prepare.prepare(cifar, lambda words: None)['train'] == 27


def test_a_directory_that_cannot_be_written_is_told(cifar, tmp_path):
    (tmp_path / 'prepared').write_text('a file')
    with pytest.raises(UserError, match=r'config.data.data_dir: .*prepared.*mend it'):
        prepare.prepare(cifar, lambda words: None)


def test_a_broken_first_image_is_told(monkeypatch):
    def broken(self, image, channels):
        raise decode.Broken('half a file')

    monkeypatch.setattr(decode.View, 'evaluation', broken)
    with pytest.raises(UserError, match=r'image \d+ cannot be decoded .half a file.; mend or'):
        prepare.prepare(tiny_config(), lambda words: None)


def test_launch_prints_json_last(forked):
    code, output, errors = forked(['--config=configs/digits.py', '--mode=prepare'])
    assert (code, errors) == (0, '')
    result = json.loads(output.splitlines()[-1])
    assert (result['train'], result['validation'], result['test']) == (1294, 144, 359)
    assert result['path'] is None


def prepare_slowly(data_dir):
    """Is a process that prepares, and hangs in the middle."""
    picture = imagenet_test.picture

    def slow(number):
        if number == 50:
            time.sleep(600)
        return picture(number)

    imagenet_test.picture = slow
    prepare.prepare(imagenet_test.shrunken(data_dir), lambda words: None)


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
    assert prepare.prepare(config, lambda words: None)['train'] == imagenet_test.TRAIN
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
    config.dataset = 'tfds:imagenet2012'
    result = prepare.prepare(config, lambda words: None)
    assert (result['train'], result['test'], result['num_classes']) == (12, 6, 1000)
    dataset = sources.dataset(config)
    images = [dataset[place] for place in range(12)]
    assert sorted(label for _, label in images) == [0] * 10 + [1] * 2
    assert {*odd.values()} < {image for image, _ in images}
    for image, _ in images:
        assert dataset.view.evaluation(image, 3).shape == (8, 8, 3)

    (tmp_path / 'ILSVRC2012_img_val.tar').write_bytes(b'half')
    config.data.data_dir = str(tmp_path / 'again')
    with pytest.raises(
        UserError, match=r'img_val.tar has 4 bytes, but the archive has [\d,]+; get'
    ):
        prepare.prepare(config, lambda words: None)
