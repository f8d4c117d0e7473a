"""Preparing TFDS sets without TensorFlow: from archives to array_record, whole or not at all.

TFDS needs TensorFlow to open archives, to encode images and to shuffle large sets. The CIFAR and
MNIST families and ImageNet are therefore read here and written by TFDS's own SequentialWriter; a
plain `tfds.builder` reads the result. Other sets are prepared by their builders, some of which need
TensorFlow.
"""

import hashlib
import io
import itertools
import os
import pathlib
import shutil
import socket
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import filelock
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from afkd_jax import paths
from afkd_jax.config import Config
from afkd_jax.data.sources import idx
from afkd_jax.errors import UserError, typed_line

_SHARD, _CHUNK = 10_000, 256  # examples in a file, and in memory

Builder = Any  # tfds.core.DatasetBuilder
Splits = dict[str, Iterable[dict[str, Any]]]  # name -> examples
Paths = dict[str, pathlib.Path]  # name of an archive -> file


def builder(name: str, data_dir: str | os.PathLike | None) -> Builder:
    """Returns the TFDS builder of a set that is, or will be, stored as array_record."""
    return tfds.builder(name, data_dir=data_dir, file_format='array_record')


def elsewhere(name: str) -> str:
    """Returns the advice for sets that need TensorFlow to be prepared."""
    return (
        f'prepare it elsewhere by tfds build {name} --file_format=array_record and name its '
        'directory by --config.data.data_dir'
    )


def _tfds_order(split: str, count: int) -> list[int]:
    """Returns 0 .. count - 1 as TFDS shuffles examples whose keys are their numbers.

    So a run is the same, bit for bit, whether TFDS has prepared the set or we have.
    """
    return sorted(range(count), key=lambda i: hashlib.md5(f'{split}{i}'.encode()).digest())


# name of a set -> label features with their names, and files of the splits
_CIFAR = {
    'cifar10': (
        {'label': 'batches.meta.txt'},
        {'train': [f'data_batch_{n}.bin' for n in range(1, 6)], 'test': ['test_batch.bin']},
    ),
    'cifar100': (
        {'coarse_label': 'coarse_label_names.txt', 'label': 'fine_label_names.txt'},
        {'train': ['train.bin'], 'test': ['test.bin']},
    ),
}


def _cifar(builder: Builder, paths: Paths) -> Splits:
    labels, splits = _CIFAR[builder.name]
    (path,) = paths.values()
    files = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if file := archive.extractfile(member):
                files[os.path.basename(member.name)] = file.read()
    for feature, name in labels.items():
        names = files[name].decode().split('\n')
        builder.info.features[feature].names = [name for name in names if name]

    def examples(split: str, names: list[str]) -> Iterator[dict[str, Any]]:
        # A row: the labels, then the red, green and blue plane.
        data = np.frombuffer(b''.join(files[name] for name in names), np.uint8)
        rows = data.reshape(-1, len(labels) + 3 * 32 * 32)
        for i in _tfds_order(split, len(rows)):
            pixels = rows[i, len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
            yield {
                'id': f'{split}_{i:05d}',
                'image': Image.fromarray(np.ascontiguousarray(pixels)),
                **dict(zip(labels, rows[i].tolist(), strict=False)),
            }

    return {split: examples(split, names) for split, names in splits.items()}


def _mnist(builder: Builder, paths: Paths) -> Splits:
    def examples(split: str, images: np.ndarray, labels: np.ndarray) -> Iterator[dict[str, Any]]:
        for i in _tfds_order(split, len(images)):
            yield {'image': Image.fromarray(images[i]), 'label': int(labels[i])}

    def read(split: str, what: str, axes: int) -> np.ndarray:
        ending = f'{what}-idx{axes}-ubyte.gz'
        if builder.name != 'emnist':
            path = paths[f'{"t10k" if split == "test" else split}-{ending}']
            return idx.read(path, axes)
        (path,) = paths.values()
        name = f'gzip/emnist-{builder.builder_config_name}-{split}-{ending}'
        with zipfile.ZipFile(path) as archive, archive.open(name) as file:
            return idx.read(path / name, axes, file)

    return {
        split: examples(split, read(split, 'images', 3), read(split, 'labels', 1))
        for split in ('train', 'test')
    }


def _imagenet(builder: Builder, paths: Paths) -> Splits:
    """Returns the examples in the order of the archives: 150 GB are not shuffled, nor need be.

    The few images that are CMYK or PNG are stored as they are, since decode.pixels() reads them.
    The test images have no labels and are left out.
    """
    train, validation = (paths[f'ILSVRC2012_img_{split}.tar'] for split in ('train', 'val'))

    def images(file: Any) -> Iterator[tuple[str, io.BytesIO]]:
        with tarfile.open(fileobj=file) as archive:
            for member in archive:
                if content := archive.extractfile(member):
                    yield os.path.basename(member.name), io.BytesIO(content.read())

    def examples(archive: pathlib.Path) -> Iterator[dict[str, Any]]:
        with open(archive, 'rb') as file:
            for name, content in images(file):
                if archive == train:  # a tar per class
                    for image_name, image in images(content):
                        label = name.removesuffix('.tar')
                        yield {'file_name': image_name, 'image': image, 'label': label}
                else:
                    yield {'file_name': name, 'image': content, 'label': labels[name]}

    with tarfile.open(validation) as archive:
        names = sorted(archive.getnames())
    published = tfds.core.tfds_path('datasets/imagenet2012/validation_labels.txt')
    labels = dict(zip(names, published.read_text().split(), strict=False))
    return {'train': examples(train), 'validation': examples(validation)}


_READERS: dict[str, Callable[[Builder, Paths], Splits]] = {
    **dict.fromkeys(_CIFAR, _cifar),
    **dict.fromkeys(('mnist', 'fashion_mnist', 'kmnist', 'emnist'), _mnist),
    'imagenet2012': _imagenet,
}


def _archives(builder: Builder) -> dict[str, str]:
    """Returns {URL: file name} of the archives that a builder is known to download."""
    known = (builder.url_infos or {}).items()
    return {url: file.filename or os.path.basename(url) for url, file in known}


def _unreachable_host(builder: Builder, manual: pathlib.Path | None) -> str | None:
    """Returns a required host that DNS does not know, for which TFDS would retry for minutes."""
    downloaded = builder.data_dir_root / 'downloads'
    if urllib.request.getproxies() or (downloaded.is_dir() and any(downloaded.iterdir())):
        return None  # TFDS may get it, or have it
    for url, name in _archives(builder).items():
        if manual and (manual / name).exists():
            continue
        host = urllib.parse.urlparse(url).hostname
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            return host
    return None


def _check_manual(builder: Builder, manual: pathlib.Path) -> None:
    # TFDS compares checksums of what it would download, but not of ImageNet's 150 GB.
    if not manual.is_dir():
        raise UserError(f'config.data.manual_dir: there is no directory {manual}')
    for url, name in _archives(builder).items():
        path, known = manual / name, int(builder.url_infos[url].size)
        if path.is_file() and path.stat().st_size != known:
            raise UserError(
                f'config.data.manual_dir: {path} has {path.stat().st_size:,} bytes, but the '
                f'archive has {known:,}; get it again'
            )


def prepare(builder: Builder, config: Config, name: str) -> None:
    """Prepares a set, or waits for another process that does; it is there whole, or not at all."""
    path = pathlib.Path(builder.data_path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.parent / f'.{path.name}.lock'):
            # Rests of a killed process: no other process writes while we hold the lock.
            for rest in path.parent.glob(f'incomplete.*_{path.name}'):
                shutil.rmtree(rest, ignore_errors=True)
            if not builder.is_prepared():  # nor by the process that held the lock before
                _prepare(builder, config, name)
    except OSError as error:
        raise UserError(
            f'config.data.data_dir: {error.filename or path}: {error.strerror or error}; repair '
            'it, or name another directory'
        ) from error


def _prepare(builder: Builder, config: Config, name: str) -> None:
    wanted = config.data.manual_dir
    manual = paths.local('config.data.manual_dir', wanted) if wanted else None
    archives = ', '.join(_archives(builder).values()) or 'its archives'
    remedy = f'put {archives} into a directory and name it by --config.data.manual_dir, or '
    remedy += elsewhere(name)
    if manual:
        _check_manual(builder, manual)
    if host := _unreachable_host(builder, manual):
        raise UserError(
            f'config.dataset: tfds:{name} is not prepared in {builder.data_path}, not all of its '
            f'archives are in config.data.manual_dir={wanted!r}, and they cannot be downloaded '
            f'({host} is not reachable); {remedy}'
        )
    try:
        if builder.name in _READERS and builder.version == builder.canonical_version:
            _write(builder, name, manual)
        else:
            options = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
            builder.download_and_prepare(download_config=options)
    except Exception as error:  # TFDS raises whatever its builders and their libraries raise
        raise UserError(
            f'config.dataset: tfds:{name} could not be prepared in {builder.data_path} '
            f'({typed_line(error)}); {remedy}'
        ) from error


def _write(target: Builder, name: str, manual: pathlib.Path | None) -> None:
    """Writes a set to a folder beside its own, which is then renamed."""
    path, urls = pathlib.Path(target.data_path), _archives(target)
    downloads = tfds.download.DownloadManager(
        download_dir=target.data_dir_root / 'downloads',
        manual_dir=manual,
        url_infos=target.url_infos,
        dataset_name=target.name,
    )
    if target.MANUAL_DOWNLOAD_INSTRUCTIONS:
        paths = {file: (manual or pathlib.Path()) / file for file in urls.values()}
    else:
        found = downloads.download({file: url for url, file in urls.items()})
        paths = {file: pathlib.Path(archive) for file, archive in found.items()}
    folder = tempfile.mkdtemp(prefix='incomplete.', suffix=f'_{path.name}', dir=path.parent)
    try:
        new = builder(name, folder)
        new_path = pathlib.Path(new.data_path)
        new_path.mkdir(parents=True)
        splits = _READERS[new.name](new, paths)
        new.info.download_size = downloads.downloaded_size
        writer = tfds.core.SequentialWriter(new.info, _SHARD, file_format='array_record')
        writer.initialize_splits(list(splits))
        for split, examples in splits.items():
            rest = iter(examples)
            while chunk := list(itertools.islice(rest, _CHUNK)):
                writer.add_examples({split: chunk})
        writer.close_all()
        new_path.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
