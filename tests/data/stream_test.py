"""Batches that are read and decoded ahead: which, in which order, and broken images."""

import dataclasses
import io
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from conftest import take_devices, tiny_config
from PIL import Image
from sklearn.datasets import load_digits

from afkd_jax.data import dataset as dataset_lib
from afkd_jax.data import order as order_lib
from afkd_jax.data import pipelines, stream
from afkd_jax.data.examples import Images
from afkd_jax.devices import mesh
from afkd_jax.errors import UserError
from afkd_jax.training import run as run_lib

DIGITS = load_digits()
PIXELS = (DIGITS.images * 15).astype(np.uint8)


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Returns a folder of 60 + 20 digits of 16 x 12 .. 75 x 71, JPEG and PNG, in 10 classes."""
    root = tmp_path_factory.mktemp('folder')
    for i in range(80):
        size = (16 + i % 60, 12 + i % 60)
        pixels = np.asarray(Image.fromarray(PIXELS[i]).resize(size).convert('RGB'))
        split = 'train' if i < 60 else 'val'
        name = f'{i:03}.png' if i % 4 == 0 else f'{i:03}.JPEG'
        write(root / split / f'class {DIGITS.target[i]}' / name, pixels)
    return root


def crops(folder, **fields):
    return tiny_config(
        **{
            'dataset': f'folder:{folder}',
            'batch_size': 8,
            'eval_batch_size': 8,
            'data__image_size': 8,
            'data__eval_resize': 9,
            'data__pad': 0,
            'data__validation_fraction': 0.0,
            'data__mean': (0.3,) * 3,
            'data__std': (0.3,) * 3,
        }
        | fields
    )


def digits(**fields):
    defaults = {'batch_size': 8, 'data__placement': 'stream', 'data__train_examples': 100}
    return tiny_config(**{'data__validation_fraction': 0.0} | defaults | fields)


def read(config, first, last, workers):
    """Returns (pixels, labels) of the steps first .. last - 1."""
    dataset = dataset_lib.dataset(config)
    order = order_lib.Order(config.seed, dataset.info.train, config.batch_size)
    size = config.batch_size
    made = stream.Batches(dataset, order.indices, last, size, np.arange(size), config.seed)
    with stream.stream(made, first, workers) as rows:
        return [(own.pixels.copy(), own.labels.copy()) for own in rows]


def equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ('workers', 'first'),
    [
        (1, 0),
        pytest.param(1, 4, marks=pytest.mark.slow),
        pytest.param(2, 0, marks=pytest.mark.slow),
        (2, 4),  # from the middle of an epoch
    ],
)
def test_the_order_and_the_crops_are_the_same_whatever_the_number_of_workers(
    folder, workers, first
):
    config = crops(folder)
    equal(read(config, first, 9, workers), read(config, first, 9, 0))


def test_every_image_comes_once_in_every_epoch():
    config = digits()
    order = order_lib.Order(config.seed, 100, 8)
    images = np.concatenate([pixels for pixels, _ in read(config, 0, 25, 0)])  # two epochs
    dataset = dataset_lib.dataset(config)
    index = np.concatenate([order.indices(step) for step in range(25)])
    for epoch in (index[:100], index[100:]):
        assert sorted(epoch) == list(range(100))
    assert (index[:100] != index[100:]).any()
    for image, i in zip(images, index, strict=True):
        np.testing.assert_array_equal(image, dataset[i][0])


def test_crops_differ_between_epochs_and_seeds(folder):
    config = crops(folder, batch_size=60)
    order = order_lib.Order(config.seed, 60, 60)
    epochs = [
        pixels[np.argsort(order.indices(step))]
        for step, (pixels, _) in enumerate(read(config, 0, 2, 0))
    ]
    assert (epochs[0] != epochs[1]).any(axis=(1, 2, 3)).mean() > 0.9
    other = crops(folder, batch_size=60, seed=1)
    ((pixels, _),) = read(other, 0, 1, 0)
    pixels = pixels[np.argsort(order_lib.Order(1, 60, 60).indices(0))]
    assert (epochs[0] != pixels).any(axis=(1, 2, 3)).mean() > 0.9


def created(config, count=4):
    lines, dataset = [], dataset_lib.dataset(config)
    return pipelines.create(config, dataset, take_devices(count), lines.append), lines


def evaluated(pipeline, split='test'):
    """Returns (pixels, labels) of what the mask lets through."""
    with pipeline.evaluation(pipeline.info.indices(split)) as parts:
        seen = [jax.device_get((*images.rows(index), mask)) for images, index, mask in parts]
    pixels, labels, mask = (np.concatenate(part) for part in zip(*seen, strict=True))
    return pixels[mask], labels[mask]


@pytest.mark.parametrize('placement', ['host', 'stream'])
@pytest.mark.parametrize('mapping', ['shard_map', 'pmap'])
def test_all_placements_give_the_same_batches(placement, mapping):
    devices = take_devices(4, mapping)

    def batch(placement):
        config = digits(data__validation_fraction=0.1, data__placement=placement)
        pipeline = pipelines.create(config, dataset_lib.dataset(config), devices, lambda line: None)
        assert pipeline.placement == placement
        with pipeline.training(3) as steps:
            images, index = next(steps)
        for array, abstract in zip(
            jax.tree.leaves((images, index)),
            jax.tree.leaves(pipeline.abstract_batch(8)),
            strict=True,
        ):
            assert (array.shape, array.dtype) == (abstract.shape, abstract.dtype)
            if placement == 'stream':  # the others may be on one device as they are
                assert array.sharding.is_equivalent_to(abstract.sharding, array.ndim)
        images, index = jax.device_get((images, index))
        rows = [part.reshape(8, *part.shape[index.ndim :]) for part in images.rows(index)]
        assert images.mean.dtype == np.float32
        return rows, (images.mean, images.std), index.ravel()

    equal(batch(placement), batch('device'))


def test_evaluation_sees_every_image_once():
    for split, count in (('test', 359), ('train', 100)):
        pipeline, _ = created(digits(eval_batch_size=64))
        streamed = evaluated(pipeline, split)
        whole, _ = created(digits(eval_batch_size=64, data__placement='device'))
        assert len(streamed[0]) == count
        equal(streamed, evaluated(whole, split))


@pytest.mark.parametrize(('peers', 'shards'), [(1, 4), (2, 2), (2, 4)])
def test_every_process_makes_its_own_rows(peers, shards, monkeypatch):
    # As two processes would, each with every second half of the devices.
    devices = take_devices(peers * shards, peers=peers)
    array = np.arange(16)[:, None] * np.ones((1, 3))
    half = peers * shards // 2
    rows = []
    for own in (devices.mesh.devices.ravel()[:half], devices.mesh.devices.ravel()[half:]):
        sharding = devices.shardings(mesh.BATCH_SHARDED)
        parts = {d: index for d, index in sharding.devices_indices_map((16,)).items() if d in own}
        monkeypatch.setattr(
            type(sharding), 'addressable_devices_indices_map', lambda self, shape, p=parts: p
        )
        rows.append(devices.rows(16))
        monkeypatch.undo()
    assert set(np.concatenate(rows)) == set(range(16))
    if peers == 1:
        assert len(np.concatenate(rows)) == 16
    else:  # both have all shards of the batch, each for its networks
        assert all(len(own) == 16 for own in rows)
    np.testing.assert_array_equal(devices.split_rows(array, 16), array)


def test_split_rows_puts_them_where_they_belong(monkeypatch):
    # This process's devices are rows 4 .. 11 of 16; what callback is asked for must be of those.
    devices = take_devices(4)
    array = np.arange(16)[:, None] * np.ones((1, 3))
    monkeypatch.setattr(mesh.Devices, 'rows', lambda self, size: np.arange(4, 12))
    asked = {}

    def make(shape, sharding, part):
        assert shape == (16, 3)
        for start in (4, 8):
            asked[start] = part((slice(start, start + 4), slice(None)))

    monkeypatch.setattr(jax, 'make_array_from_callback', make)
    devices.split_rows(array[4:12], 16)
    for start, part in asked.items():
        np.testing.assert_array_equal(part, array[start : start + 4])


@pytest.fixture
def broken(folder, tmp_path):
    """Returns a copy of the folder in which two training images and a test image are broken."""
    root = shutil.copytree(folder, tmp_path / 'broken')
    names = [
        sorted(path for path in (root / split).rglob('*') if path.is_file())
        for split in ('train', 'val')
    ]
    for path in (names[0][3], names[0][40], names[1][5]):
        path.write_bytes(path.read_bytes()[:30])
    return root, names[0][3], names[1][5]


def test_a_broken_image_stops_the_run_by_default(broken):
    root, *_ = broken
    pipeline, _ = created(crops(root))
    words = r'^config.data.max_corrupt: 1 images cannot .*broken/train'
    with pipeline.training(0) as steps, pytest.raises(UserError, match=words):
        list(steps)


@pytest.mark.parametrize('workers', [0, 2])
def test_broken_images_are_counted_named_and_skipped(broken, workers):
    root, first, test = broken
    pipeline, lines = created(crops(root, data__max_corrupt=3, data__workers=workers))
    with pipeline.training(0) as steps:
        seen = [jax.device_get(next(steps)) for _ in range(16)]  # twice through
    assert len(lines) == 2
    assert any(f'{first}: ' in line for line in lines)
    assert lines[1].startswith('warning: an image is skipped (2 of at most 3): ')
    # What stands in for it is the next image of the order.
    labels = np.concatenate([images.labels for images, _ in seen])
    index = np.concatenate([index for _, index in seen])
    dataset = pipeline.dataset
    for i, label in zip(index.tolist(), labels.tolist(), strict=True):
        expected = i if i not in pipeline.broken else (i + 1) % 60
        assert label == dataset[expected][1]
    # In evaluation it is left out.
    assert len(evaluated(pipeline)[1]) == 19
    assert (lines[2], len(lines)) == (
        f'warning: an image is skipped (3 of at most 3): {test}: ' + lines[2].rsplit(': ', 1)[1],
        3,
    )


def test_an_image_of_another_size_is_broken_where_none_is_resized(tmp_path):
    for split in ('train', 'val'):
        for i in range(10):
            write(tmp_path / split / str(i % 2) / f'{i}.png', PIXELS[i])
    config = tiny_config(dataset=f'folder:{tmp_path}', batch_size=2, data__validation_fraction=0.0)
    info = dataset_lib.dataset(config).info
    assert info.image_shape == (8, 8, 1)
    assert len(dataset_lib.dataset(config).load()) == 20
    write(tmp_path / 'train/0/2.png', PIXELS[2][:7])
    with pytest.raises(UserError, match=r'train/0/2.png: it is \(7, 8, 1\), others \(8, 8'):
        dataset_lib.dataset(config).load()
    config = config.replace(**{'data.placement': 'stream'})
    with pytest.raises(UserError, match=r'max_corrupt: 1 .*2.png: it is \(7, 8, 1\), others'):
        created(config, 1)  # it reads them all, for their mean


def test_workers_end_with_the_process_that_trains(folder):
    # However that ends: it is killed while they wait for it to take a batch.
    program = f"""
import multiprocessing, sys, time
sys.path[:0] = ['tests', 'tests/data', '.']
import stream_test, numpy as np
from afkd_jax.data import order as order_lib, dataset as dataset_lib, stream
if __name__ == '__main__':
    config = stream_test.crops({str(folder)!r})
    dataset = dataset_lib.dataset(config)
    order = order_lib.Order(0, 60, 8)
    made = stream.Batches(dataset, order.indices, 10**6, 8, np.arange(8), 0)
    with stream.stream(made, 0, 1) as rows:
        next(rows)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(600)
"""
    path = folder / 'program.py'
    path.write_text(program)
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, path],
        cwd=root,
        env=os.environ | {'PYTHONPATH': str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    (worker,) = map(int, process.stdout.readline().split())
    assert pathlib.Path(f'/proc/{worker}').exists()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while pathlib.Path(f'/proc/{worker}').exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_signal_to_the_whole_group_does_not_reach_workers_that_start(folder):
    # As Ctrl-C in a terminal does. It comes to this process alone, once they are started.
    config, came = crops(folder), []
    dataset = dataset_lib.dataset(config)
    order = order_lib.Order(config.seed, 60, 8)
    made = stream.Batches(dataset, order.indices, 20, 8, np.arange(8), config.seed)
    group, own = os.getpgrp(), os.getpid()
    old = signal.signal(signal.SIGINT, lambda *_: came.append(1))

    def interrupt():
        while not multiprocessing.active_children():
            time.sleep(0.001)
        for _ in range(20):
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGINT)
            time.sleep(0.05)
        os.kill(own, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with stream.stream(made, 0, 1) as rows:
            assert len(list(rows)) == 20
    finally:
        thread.join()
        signal.signal(signal.SIGINT, old)
    assert came == [1]
    assert os.getpgrp() == group


def test_workers_for_which_shared_memory_is_too_small_are_rejected(folder, monkeypatch):
    monkeypatch.setattr(
        stream.shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=30_000)
    )
    # 15,360 bytes a worker: 5 batches, of 8 images to train and of 8 to evaluate, of 192 bytes.
    created(crops(folder, data__workers=1))
    with pytest.raises(
        UserError, match=r'workers: 2 processes need 30,720 bytes of .* 30,000; use'
    ):
        created(crops(folder, data__workers=2))


def test_where_most_images_are_broken_one_error_message_ends_it(tmp_path):
    for name in ('train/a/0.png', 'train/a/1.png', 'train/b/2.png', 'val/a/3.png'):
        write(tmp_path / name, PIXELS[0])
    for name in ('train/a/0.png', 'train/b/2.png'):
        (tmp_path / name).write_bytes(b'')
    for most, words in ((0, '1 images cannot be decoded'), (1, 'nor can the next 1 images of the')):
        pipeline, _ = created(crops(tmp_path, batch_size=3, data__max_corrupt=most), 1)
        with pipeline.training(0) as steps, pytest.raises(UserError, match=words):
            list(steps)
    for name, split in (
        ('val/a/3.png', '1 images of test'),
        ('train/a/1.png', '3 images of train'),
    ):
        (tmp_path / name).write_bytes(b'')
        with pytest.raises(UserError, match=f'none of the {split} can .*{name[:6]}.*; repair them'):
            created(crops(tmp_path, batch_size=3, data__max_corrupt=9), 1)


def test_a_label_that_is_no_class_is_rejected(monkeypatch):
    class Wrong(Images):
        def __getitem__(self, index):
            return self.pixels[index], -1

    config = digits()
    dataset = dataset_lib.dataset(config)
    right = dataset.test.examples
    wrong = Wrong(right.pixels, right.labels - 20)
    bad = dataclasses.replace(dataset, test=dataset.test._replace(examples=wrong))
    with pytest.raises(
        UserError, match=r'image 0 has the label -\d+, but there are 10 classes; ch'
    ):
        bad.load()
    with pytest.raises(UserError, match='-1'):
        pipelines.create(config, bad, take_devices(), lambda line: None)


def test_images_of_more_than_a_byte_are_broken(tmp_path):
    for name in ('train/a/0.png', 'train/b/1.png', 'val/a/2.png'):
        write(tmp_path / name, PIXELS[0].astype(np.uint16) * 255)
    with pytest.raises(UserError, match='none of .*train/a/0.png: .* no bytes .mode I;16'):
        created(crops(tmp_path, batch_size=1), 1)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'data__placement': 'device'}, "placement: must be 'stream' or 'auto'"),
        ({'data__mean': (), 'data__std': ()}, 'mean: must be given'),
        ({'data__mean': (0.5,)}, 'mean: 1 numbers are given for images of 3 channels'),
        ({'data__std': ()}, 'std: 0 numbers are given for images of 3 channels'),
        ({'data__eval_resize': 7}, 'eval_resize: must be at least config.data.image_size, 8'),
    ],
)
def test_what_does_not_fit_the_images_is_rejected(folder, fields, message):
    with pytest.raises(UserError, match=f'config.data.({message})'):
        created(crops(folder, **fields))


def test_classes_without_a_training_image_are_named():
    line = pipelines.without_images(('0', 'a', 'b'), np.array([1, 2, 1]))  # as those of EMNIST
    assert line.startswith('warning: 1 of 3 classes have no training image: 0 ("0"); the networks')
    assert pipelines.without_images(('a', 'b'), np.array([1, 0])) is None
    _, (line,) = created(digits(data__placement='device', data__train_examples=8))
    assert re.match(r'warning: \d of 10 classes have no', line)


def test_where_the_images_go_by_default(monkeypatch, folder):
    devices = take_devices(4)
    info = dataset_lib.Info((100, 100, 1), ('a', 'b'), 80, 0, 20)  # 1 MB
    for memory, expected in ((4_000_000 * 4, 'device'), (3_900_000 * 4, 'stream')):
        monkeypatch.setattr(pipelines.memory, 'device_bytes', lambda device, m=memory: m)
        assert pipelines.shapes_only(tiny_config(), info, devices).placement == expected
    assert pipelines.shapes_only(crops(folder), info, devices).placement == 'stream'


def test_a_streamed_run_prepares_like_any_other(folder):
    run = run_lib.prepare(crops(folder, batch_size=8))
    assert run.pipeline.placement == 'stream'
    classes = tuple(f'class {i}' for i in range(10))
    assert run.info == dataset_lib.Info((8, 8, 3), classes, 60, 0, 20)
    assert pathlib.Path(run.pipeline.dataset.name(0)).is_file()
    assert io.BytesIO(run.pipeline.dataset[0][0])
