"""Image files in folders."""

import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from conftest import take_devices, tiny_config
from PIL import Image

from afkd_jax import cli
from afkd_jax.data import dataset as dataset_lib
from afkd_jax.data import decode, pipelines
from afkd_jax.data.sources import folder
from afkd_jax.errors import UserError


def write(root, *names):
    """Writes small grey PNG files, whatever they are called; the n-th is n all over."""
    for value, name in enumerate(names):
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            Image.fromarray(np.full((4, 6), value, np.uint8)).save(file, 'PNG')


def source(root, **fields):
    return folder.source(tiny_config(**fields), str(root))


def folder_config(root, **fields):
    defaults = {'batch_size': 2, 'data__pad': 0, 'data__validation_fraction': 0.0}
    return tiny_config(dataset=f'folder:{root}', **defaults | fields)


def found(root):
    """Returns ({name: label} of train, of test, class names)."""
    of = source(root)
    return *({s.name(i): s[i][1] for i in range(len(s))} for s in (of.train, of.test)), of.classes


NAMES = (
    'train/a class/0.png',
    'train/a class/nested/deeper/1.JPG',
    'train/ünï\'code "x"/2 3.jpeg',
    'train/ünï\'code "x"/.hidden.png',
    'train/.hidden/4.png',
    'train/-rf/5.WEBP',
    'train/-rf/readme.txt',
    'val/-rf/6.png',
    'val/a class/7.png',
)


def test_unusual_names_and_nested_files_are_found(tmp_path):
    write(tmp_path, *NAMES)
    train, test, classes = found(tmp_path)
    assert classes == ('-rf', 'a class', 'ünï\'code "x"')
    expected = {NAMES[5]: 0, NAMES[0]: 1, NAMES[1]: 1, NAMES[2]: 2}
    assert train == {str(tmp_path / name): label for name, label in expected.items()}
    # A class without test images keeps its number.
    assert test == {str(tmp_path / NAMES[7]): 0, str(tmp_path / NAMES[8]): 1}


def test_names_that_are_no_unicode_are_read(tmp_path):
    write(tmp_path, b'train/\xff\xfe/0.png', b'train/b/\xc3.png', b'val/b/2.png')
    of = source(tmp_path)
    assert [label for _, label in (of.train[0], of.train[1])] == [0, 1]
    assert of.classes == ('b', r'\xff\xfe')
    of.train.fingerprint()


def test_labels_and_order_are_the_same_wherever_the_folder_lies(tmp_path):
    for root, names in (('one', NAMES), ('two', NAMES[::-1])):
        write(tmp_path / root, *names)
    one, two = (source(tmp_path / root) for root in ('one', 'two'))
    for a, b in ((one.train, two.train), (one.test, two.test)):
        assert a.fingerprint() == b.fingerprint()
        labels, others = (of.read_labels(np.arange(len(of))) for of in (a, b))
        np.testing.assert_array_equal(labels, others)
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(a.read_labels(np.array([1, 0])), labels[[1, 0]])
    os.rename(tmp_path / 'two' / NAMES[0], tmp_path / 'two/train/a class/other.png')
    assert source(tmp_path / 'two').train.fingerprint() != one.train.fingerprint()


def test_the_first_test_folder_with_classes_is_taken(tmp_path):
    write(tmp_path, 'train/a/0.png', 'train/b/1.png', 'test/unlabelled.png', 'val/a/2.png')
    assert found(tmp_path)[1] == {str(tmp_path / 'val/a/2.png'): 0}
    write(tmp_path, 'test/b/3.png')
    assert found(tmp_path)[1] == {str(tmp_path / 'test/b/3.png'): 1}


def test_val_beside_test_is_the_validation_split(tmp_path):
    names = ('train/a/0.png', 'train/b/1.png', 'test/a/2.png', 'test/b/3.png', 'validation/b/4.png')
    write(tmp_path, *names)
    (tmp_path / 'val').mkdir()  # without class folders
    dataset = dataset_lib.dataset(folder_config(tmp_path))
    assert dataset.info == dataset_lib.Info((4, 6, 1), ('a', 'b'), 2, 1, 2)
    images, indices = dataset.load(), dataset.info.indices
    for split, value, label in (('validation', [4], [1]), ('test', [2, 3], [0, 1])):
        part, names_of = images.take(np.array(indices(split))), map(dataset.name, indices(split))
        assert part.pixels.max((1, 2, 3)).tolist() == value
        assert part.labels.tolist() == label
        assert [*names_of] == [str(tmp_path / names[v]) for v in value]
        assert [dataset[i][1] for i in indices(split)] == label
    message = r'validation_fraction: must be 0, as folder:.* validation split .* of 1 im.* 0.5'
    with pytest.raises(UserError, match=message):
        dataset_lib.info(folder_config(tmp_path, data__validation_fraction=0.5))
    fingerprint = dataset.fingerprint()
    for name in ('valid', 'val'):
        shutil.rmtree(tmp_path / 'val', ignore_errors=True)
        (tmp_path / 'validation').rename(tmp_path / name)
        dataset = dataset_lib.dataset(folder_config(tmp_path))
        assert dataset.name(2) == str(tmp_path / name / 'b/4.png')
        (tmp_path / name).rename(tmp_path / 'validation')
    write(tmp_path, 'validation/a/0.png')
    assert dataset_lib.dataset(folder_config(tmp_path)).fingerprint() != fingerprint
    write(tmp_path, 'validation/c/0.png')
    with pytest.raises(UserError, match=r"validation has the class 'c'"):
        dataset_lib.dataset(folder_config(tmp_path))


def test_size_channels_and_sizes_of_the_splits(tmp_path):
    write(tmp_path, 'train/a/0.png', 'train/b/1.png', 'val/a/2.png')
    assert source(tmp_path).train.image_shape == (4, 6, 1)
    assert source(tmp_path, data__image_size=8).train.image_shape == (None, None, 3)
    config = folder_config(tmp_path)
    dataset = dataset_lib.dataset(config)
    assert dataset.info == dataset_lib.Info((4, 6, 1), ('a', 'b'), 2, 0, 1)
    assert [int(image.max()) for image in dataset.load().pixels[2:]] == [2]
    assert {int(image.max()) for image in dataset.load().pixels[:2]} == {0, 1}
    assert dataset_lib.info(config) == dataset.info


RED = np.full((4, 6, 3), (255, 0, 0), np.uint8)


@pytest.mark.parametrize(
    ('name', 'mode', 'form'),
    [
        ('train/a/1.png', 'RGB', 'JPEG'),
        ('train/b/2.png', 'P', 'PNG'),
        ('val/a/3.png', 'CMYK', 'JPEG'),
        ('val/a/3.png', 'RGBA', 'PNG'),
    ],
)
def test_one_coloured_image_makes_all_coloured(name, mode, form, tmp_path):
    write(tmp_path, 'train/a/0.png', 'train/a/1.png', 'train/b/2.png', 'val/a/3.png')
    Image.fromarray(RED).convert(mode).save(tmp_path / name, form, quality=95)
    dataset = dataset_lib.dataset(folder_config(tmp_path))
    assert dataset.info.image_shape == (4, 6, 3)
    pixels = dataset.load().pixels
    grey = [image for image in pixels if image.max() < 4]
    assert len(grey) == 3
    assert all((image == image[..., :1]).all() for image in grey)
    (coloured,) = (image for image in pixels if image.max() >= 4)
    np.testing.assert_allclose(coloured, RED, atol=2)


def test_grey_images_of_every_kind_stay_grey(tmp_path):
    write(tmp_path, 'train/a/0.png', 'train/b/1.png', 'val/a/2.png')
    grey = Image.fromarray(np.full((4, 6), 255, np.uint8))
    for mode in ('1', 'LA'):
        grey.convert(mode).save(tmp_path / f'train/a/{mode}.png')
    grey.save(tmp_path / 'train/a/3.jpg')
    dataset = dataset_lib.dataset(folder_config(tmp_path))
    assert dataset.info.image_shape == (4, 6, 1)
    values = sorted(int(image.min()) for image in dataset.load().pixels)
    assert values == [0, 1, 2, 255, 255, 255]


@pytest.mark.parametrize('content', [b'', None])
def test_a_broken_first_image_is_as_any_other(content, tmp_path):
    write(tmp_path, 'train/a/0.png', 'train/a/1.png', 'train/b/2.png', 'val/a/3.png')
    first = tmp_path / 'train/a/0.png'
    if content is None:  # 16 bits
        Image.fromarray(np.full((9, 9), 300, np.uint16)).save(first)
    else:
        first.write_bytes(content)
    dataset = dataset_lib.dataset(folder_config(tmp_path))
    assert dataset.info.image_shape == (4, 6, 1)
    with pytest.raises(UserError, match=r'train/a/0.png: .*; repair .* config.data.max_corrupt'):
        dataset.load()
    config = folder_config(tmp_path, data__placement='stream', data__max_corrupt=1)
    lines = []
    pipelines.create(config, dataset_lib.dataset(config), take_devices(), lines.append)
    assert len(lines) == 1  # the mean and standard deviation are computed without it


@pytest.mark.parametrize(
    ('names', 'message'),
    [
        (('val/a/0.png',), 'there is no directory .*train; .*train/CLASS'),
        (
            ('train/a/0.png', 'val/a/1.png'),
            'two class folders are needed in .*train, but there are 1;',
        ),
        (('train/a/0.png', 'train/b/1.png'), 'none of test, val, validation, valid in .* has'),
        (
            ('train/a/0.png', 'train/b/1.png', 'test/a/2.png', 'validation/a/3.png', 'val/a/4.png'),
            'val and .*/validation have class folders, but one validation folder is expected; move',
        ),
        (
            ('train/a/0.png', 'train/b/1.png', 'valid/a/2.png', 'validation/a/3.png'),
            'validation and .*/valid have class folders',
        ),
        (('train/a/0.png', 'train/b/1.png', 'val/c/2.png'), "val has the class 'c', which"),
        (('train/a/x.txt', 'train/b/x.txt', 'val/a/2.png'), 'no image files below .*train'),
        (('train/a/0.png', 'train/b/1.png', 'val/a/x.txt'), 'no image files below .*val'),
        (('train/a/0.png', 'train/b/x.txt', 'val/a/1.png'), 'no image files below .*train/b; ev'),
    ],
)
def test_other_folders_are_rejected(names, message, tmp_path):
    write(tmp_path, *names)
    with pytest.raises(UserError, match=f'^config.dataset: .*{message}'):
        source(tmp_path)


def test_what_nas_and_archive_programs_leave_is_no_image(tmp_path):
    junk = ('train/__MACOSX/a/._0.png', 'train/a/@eaDir/0.png/THUMB_M.png', 'train/@eaDir/0.png')
    names = ('train/a/0.jfif', 'train/a/1.JPE', 'train/b/2.png', 'val/a/3.png', *junk)
    write(tmp_path, *names, 'train/a/Thumbs.db', 'train/a/4.heic', 'train/b/.x', 'train/5.png')
    os.mkfifo(tmp_path / 'train' / 'a' / '5.png')
    of = source(tmp_path)
    assert of.classes == ('a', 'b')
    assert len(of.train) == 3
    (line,) = of.notes
    reasons = '2 no files with the extension of an image (a/4.heic, a/5.png)'
    reasons += '; 1 in no class folder (5.png)'
    assert line == f'{tmp_path}/train: passed over: {reasons}'


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path, 'far/0.png', 'train/b/1.png', 'val/a/2.png', 'more/x/3.png')
    (tmp_path / 'train/a').symlink_to('../far')
    (tmp_path / 'train/b/more').symlink_to('../../more')
    (tmp_path / 'more/back').symlink_to('.')
    (tmp_path / 'train/b/up').symlink_to('..')
    of = source(tmp_path)
    names = [os.path.relpath(of.train.name(index), tmp_path) for index in range(3)]
    assert names == ['train/a/0.png', 'train/b/1.png', 'train/b/more/x/3.png']
    assert len(of.train) == 3
    words = '2 links to a folder that contains them (b/more/back, b/up)'
    assert of.notes == (f'{tmp_path}/train: passed over: {words}',)


def test_a_missing_image_is_as_a_broken_one(tmp_path):
    write(tmp_path, 'train/a/0.png', 'train/a/1.png', 'train/b/2.png', 'val/a/3.png')
    (tmp_path / 'train/a/0.png').unlink()
    (tmp_path / 'train/a/0.png').symlink_to('/nowhere/0.png')
    dataset = dataset_lib.dataset(folder_config(tmp_path))
    with pytest.raises(UserError, match=r'a/0.png: it cannot be read \(No such file.*; repair'):
        dataset.load()
    config = folder_config(tmp_path, data__placement='stream', data__max_corrupt=1)
    pipelines.create(config, dataset, take_devices(), [].append)
    assert cli._message(FileNotFoundError(2, 'gone', b'/x/\xc3\xa9'))[0].startswith('/x/\xe9: gone')


def test_names_that_look_the_same_are_the_same_class(tmp_path):
    one, two = 'caf\xe9', 'cafe\u0301'
    write(tmp_path, f'train/{one}/0.png', 'train/b/1.png', f'val/{two}/2.png')
    of = source(tmp_path)
    assert of.classes == ('b', one)
    assert of.test[0][1] == 1
    write(tmp_path, f'train/{two}/3.png')
    with pytest.raises(UserError, match=r'two class folders that look the same, .*; rename'):
        source(tmp_path)


def test_only_the_images_that_are_used_are_decoded(tmp_path):
    write(tmp_path, *(f'train/{"ab"[n % 2]}/{n}.png' for n in range(8)), 'test/a/8.png')
    fields = {'data__train_examples': 6, 'data__validation_fraction': 0.4}
    dataset = dataset_lib.dataset(folder_config(tmp_path, **fields))
    used = {dataset.name(index) for index in range(dataset.info.examples)}
    unused = [path for path in tmp_path.rglob('*.png') if str(path) not in used]
    assert (dataset.info.train, dataset.info.validation, len(unused)) == (4, 2, 2)
    for path in unused:
        path.write_bytes(b'')
    loaded = dataset.load()
    for index, pixels, label in zip(range(7), loaded.pixels, loaded.labels, strict=True):
        number = int(dataset.name(index)[-5])
        assert (pixels == number).all()
        assert label == number % 2


def test_threads_decode_every_image_to_its_row(tmp_path):
    write(tmp_path, *(f'train/{"ab"[n % 2]}/{n:03}.png' for n in range(140)), 'val/a/x.png')
    files = source(tmp_path).train
    indices = np.random.default_rng(0).permutation(140)[:135]  # more than two chunks
    pixels, labels = np.empty((135, 4, 6, 1), np.uint8), np.empty(135, np.int32)
    files.load(indices, pixels, labels)
    for index, image, label in zip(indices, pixels, labels, strict=True):
        number = int(files.name(index)[-7:-4])
        assert (image == number).all()
        assert label == number % 2
    for index in (100, 20, 60):  # the first in the order of names is reported
        pathlib.Path(files.name(index)).write_bytes(b'')
    with pytest.raises(decode.DecodeError, match=re.escape(files.name(20))):
        files.load(np.arange(140)[::-1], np.empty((140, 4, 6, 1), np.uint8), np.empty(140))


def test_where_no_image_can_be_read_the_first_is_named(tmp_path):
    for name in ('train/a/0.png', 'train/b/1.png', 'val/a/2.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('no image')
    words = r'none of the 3 images can be read; the first is .*train/a/0.png: cannot identify'
    with pytest.raises(UserError, match=f'^config.dataset: {words}.*; repair'):
        source(tmp_path)
