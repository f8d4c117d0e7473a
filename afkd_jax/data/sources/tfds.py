"""TFDS sets without TensorFlow: prepared as array_record, read by random access."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import socket
import sys
import types
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import filelock
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image
from tensorflow_datasets.core import shuffle
from tensorflow_datasets.core.download import extractor
from tensorflow_datasets.core.features import image_feature

from afkd_jax.data.examples import Examples, seen_shape
from afkd_jax.errors import UserError, nearest

# TFDS learns a set's size only when it prepares it; these are published (train, test), so that
# `describe` works before that. Training counts what it has read. Of ImageNet the second is the
# validation split: its test images have no public labels.
_PUBLISHED_SIZES = {
    'cifar10': (50_000, 10_000),
    'cifar100': (50_000, 10_000),
    'fashion_mnist': (60_000, 10_000),
    'imagenet2012': (1_281_167, 50_000),
    'kmnist': (60_000, 10_000),
    'mnist': (60_000, 10_000),
    'stl10': (5_000, 8_000),
    'svhn_cropped': (73_257, 26_032),
}


@dataclasses.dataclass(frozen=True)
class _Keys:
    image: str
    label: str


def _builder(config: ConfigDict, name: str) -> tfds.core.DatasetBuilder:
    _check_spelling(config)
    data_dir = config.data.data_dir or None
    try:
        return tfds.builder(name, data_dir=data_dir, file_format='array_record')
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(
            f'config.dataset: TFDS has no set called "{name}"{nearest(name, known)}'
        ) from None
    except Exception as error:  # whatever a builder's constructor, and its imports, raise
        raise UserError(
            f'config.dataset: TFDS cannot offer "{name}" here: {_first_line(error)}; '
            f'choose another set, or prepare it elsewhere by tfds build {name} '
            '--file_format=array_record and name its directory by --config.data.data_dir'
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_spelling(config: ConfigDict) -> None:
    """Refuses splits that TFDS cannot read; which there are it knows only of what is prepared."""
    for field in ('train_split', 'test_split'):
        try:
            tfds.core.ReadInstruction.from_spec(config.data[field] or 'train')
        except Exception as error:  # of several kinds
            raise UserError(
                f'config.data.{field}: {config.data[field]!r} is not understood '
                f"({_first_line(error)}); write e.g. 'train[:90%]'"
            ) from error


def _keys(builder: tfds.core.DatasetBuilder, name: str) -> _Keys:
    """Returns the names of the image and the label feature; refuses sets that have none."""
    keys, features = builder.info.supervised_keys, builder.info.features
    if not keys or len(keys) != 2 or not all(isinstance(key, str) for key in keys):
        raise UserError(f'config.dataset: tfds:{name} has no (image, label) pair to learn from')
    image, label = features[keys[0]], features[keys[1]]
    if not isinstance(image, tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        raise UserError(f'config.dataset: tfds:{name} is not an image-classification set')
    return _Keys(*keys)


def _image_shape(
    builder: tfds.core.DatasetBuilder, keys: _Keys, name: str
) -> tuple[int | None, int | None, int]:
    """Returns (H, W, C) as stored; H and W are None where images have many sizes."""
    image = builder.info.features[keys.image]
    height, width, channels = image.shape
    if channels not in (1, 3) or image.np_dtype != np.uint8:
        raise UserError(
            f'config.dataset: the images of tfds:{name} are {image.shape} of '
            f'{np.dtype(image.np_dtype)}; to be trained on they must be uint8, grey or RGB'
        )
    return (None, None, channels) if None in (height, width) else (height, width, channels)


def describe(
    config: ConfigDict, name: str
) -> tuple[tuple[int | None, int | None, int], int, int, int]:
    """Returns shape as stored, classes, and the sizes of train and test; needs no data on disk."""
    builder = _builder(config, name)
    keys, splits, data = _keys(builder, name), builder.info.splits, config.data
    if splits:
        train, test = (splits[split].num_examples for split in _split_names(builder, config, name))
    elif (
        builder.name in _PUBLISHED_SIZES
        and data.train_split in ('', 'train')
        and data.test_split in ('', 'validation' if builder.name == 'imagenet2012' else 'test')
    ):
        train, test = _PUBLISHED_SIZES[builder.name]
    else:
        raise UserError(
            f'config.dataset: the size of tfds:{name}, or of the splits that '
            'config.data.train_split and test_split name, is not known before it is prepared; run '
            '--mode prepare first'
        )
    classes = builder.info.features[keys.label].num_classes
    return _image_shape(builder, keys, name), classes, train, test


def _split_names(
    builder: tfds.core.DatasetBuilder, config: ConfigDict, name: str
) -> tuple[str, str]:
    """Returns the splits of a prepared set to train on and to test on."""
    splits, names = builder.info.splits, []
    for field, usual in (('train_split', ('train',)), ('test_split', ('test', 'validation'))):
        wanted = config.data[field] or next((one for one in usual if one in splits), usual[0])
        try:
            count = splits[wanted].num_examples
        except Exception as error:  # TFDS raises several kinds for what it cannot parse or find
            raise UserError(
                f'config.data.{field}: tfds:{name} has no split "{wanted}", but '
                f'{", ".join(splits)} ({_first_line(error)})'
            ) from error
        if not count:
            raise UserError(f'config.data.{field}: "{wanted}" of tfds:{name} holds no image')
        names.append(wanted)
    return tuple(names)


@contextlib.contextmanager
def _without_tensorflow(builder: tfds.core.DatasetBuilder) -> Iterator[None]:
    """Lets TFDS prepare a set where it uses TensorFlow to open files and to write PNG, no more.

    That holds for the CIFAR and MNIST families, and for ImageNet, whose few CMYK and PNG files
    stay as they are: decode.pixels() reads them. A builder that needs more of TensorFlow fails with
    an error that _write() reports.
    """

    def encode_png(encoder, pixels):
        if encoder.encoding_format != 'png':
            raise NotImplementedError(f'{encoder.encoding_format} cannot be written here')
        return encoder._encode_pil_image(Image.fromarray(pixels.squeeze()))

    gfile = types.SimpleNamespace(GFile=open, exists=os.path.exists, remove=os.remove)
    stand_in = types.SimpleNamespace(
        io=types.SimpleNamespace(gfile=gfile),
        compat=types.SimpleNamespace(as_text=os.fsdecode),
    )
    with contextlib.ExitStack() as stack:
        package = type(builder).__module__.rpartition('.')[0]
        own = [module for name, module in sys.modules.items() if name.rpartition('.')[0] == package]
        for module in (*own, extractor, shuffle):
            if hasattr(module, 'tf'):
                stack.enter_context(mock.patch.object(module, 'tf', stand_in))
        for name in ('jpeg_cmyk_to_rgb', 'png_to_jpeg'):
            stack.enter_context(mock.patch.object(tfds.core.utils, name, lambda image: image))
        encoder = image_feature._ImageEncoder
        stack.enter_context(mock.patch.object(encoder, '_encode_image', encode_png))
        yield


def _archives(builder: tfds.core.DatasetBuilder) -> dict[str, str]:
    """Returns the files that a builder is known to download: {address: name}."""
    known = (builder.url_infos or {}).items()
    return {url: file.filename or os.path.basename(url) for url, file in known}


def _missing_host(builder: tfds.core.DatasetBuilder, manual: pathlib.Path | None) -> str | None:
    """Returns a host that is needed but unknown to DNS, so that TFDS need not retry for minutes."""
    downloaded = pathlib.Path(builder._data_dir_root) / 'downloads'
    if urllib.request.getproxies() or (downloaded.is_dir() and any(downloaded.iterdir())):
        return None  # TFDS may get, or have, it all the same
    for url, name in _archives(builder).items():
        if manual and (manual / name).exists():
            continue
        host = urllib.parse.urlparse(url).hostname
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            return host
    return None


def _check_manual(builder: tfds.core.DatasetBuilder, manual: pathlib.Path) -> None:
    """Refuses a manual_dir that is not there, and an archive in it of another than its known size.

    Sums are TFDS's business, which takes them of what it uses as a download; of ImageNet's 144 GB,
    which it only reads, it takes none.
    """
    if not manual.is_dir():
        raise UserError(f'config.data.manual_dir: there is no directory {manual}')
    for url, name in _archives(builder).items():
        path, known = manual / name, int(builder.url_infos[url].size)
        if path.is_file() and path.stat().st_size != known:
            raise UserError(
                f'config.data.manual_dir: {path} has {path.stat().st_size:,} bytes, but the '
                f'archive has {known:,}; get it again'
            )


def _prepare(builder: tfds.core.DatasetBuilder, config: ConfigDict, name: str) -> None:
    """Prepares a set, or waits for another process that does; it is there whole, or not at all."""
    path = pathlib.Path(builder.data_path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.parent / f'.{path.name}.lock'):
            # What a process that was killed has left: nobody else writes while we have the lock.
            for rest in path.parent.glob(f'incomplete.*_{path.name}'):
                shutil.rmtree(rest, ignore_errors=True)
            if not builder.is_prepared():  # nor by who had the lock before
                _write(builder, config, name)
    except OSError as error:
        raise UserError(
            f'config.data.data_dir: {error.filename or path}: {error.strerror or error}; mend it, '
            'or name another directory'
        ) from error


def _write(builder: tfds.core.DatasetBuilder, config: ConfigDict, name: str) -> None:
    wanted = config.data.manual_dir
    manual = pathlib.Path(wanted).expanduser() if wanted else None
    archives = ', '.join(_archives(builder).values()) or 'its archives'
    remedy = (
        f'put {archives} into a directory and name it by --config.data.manual_dir, '
        'or copy a prepared set from elsewhere and name its directory by --config.data.data_dir'
    )
    if manual:
        _check_manual(builder, manual)
    if host := _missing_host(builder, manual):
        raise UserError(
            f'config.dataset: tfds:{name} is not prepared in {builder.data_path}, not all of its '
            f'archives are in config.data.manual_dir={wanted!r}, and they cannot be downloaded '
            f'({host} is not reachable); {remedy}'
        )
    try:
        with _without_tensorflow(builder):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(
                    manual_dir=manual, try_download_gcs=False
                )
            )
    except Exception as error:  # TFDS raises whatever its builders and their libraries raise
        raise UserError(
            f'config.dataset: tfds:{name} could not be prepared in {builder.data_path} '
            f'({type(error).__name__}: {_first_line(error)}); {remedy}'
        ) from error


class _Split(Examples):
    """One split of a prepared set, its images as they are stored.

    Args:
      builder: of the set.
      split: its name.
      keys: of image and label.
      image_shape: as stored.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        keys: _Keys,
        image_shape: tuple[int | None, int | None, int],
    ):
        self.image_shape = image_shape
        self._builder, self._split, self._keys = builder, split, keys
        skip = {keys.image: tfds.decode.SkipDecoding()}
        self._source = builder.as_data_source(split=split, decoders=skip)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        example = self._source[index]
        return example[self._keys.image], int(example[self._keys.label])

    def read_labels(self) -> np.ndarray:
        """Returns the labels; reads every record, but decodes no image."""
        return np.fromiter((self[i][1] for i in range(len(self))), np.int32, len(self))

    def name(self, index: int) -> str:
        """Returns file and record."""
        for file in self._files():
            if index < file.take:
                return f'record {file.skip + index} of {file.filename}'
            index -= file.take
        raise IndexError(index)

    def _files(self) -> list[Any]:
        """Returns which records of which files make the split: filename, skip, take."""
        return self._builder.info.splits[self._split].file_instructions

    def fingerprint(self) -> str:
        """Returns a hash of name, version and files with their sizes, which TFDS never rewrites."""
        files = [
            (os.path.basename(file.filename), file.skip, file.take, os.stat(file.filename).st_size)
            for file in self._files()
        ]
        whole = self._builder.info.full_name, files
        return hashlib.sha256(repr(whole).encode()).hexdigest()


def prepare(config: ConfigDict, name: str, tell: Callable[[str], None]) -> pathlib.Path:
    """Prepares a set if it is not prepared yet, and returns where it lies."""
    builder, *_ = _prepared(config, name, tell)
    return pathlib.Path(builder.data_path)


def _prepared(
    config: ConfigDict, name: str, tell: Callable[[str], None]
) -> tuple[tfds.core.DatasetBuilder, _Keys, tuple[int | None, int | None, int]]:
    """Returns a set's builder, keys and stored shape of images, once it is prepared."""
    builder = _builder(config, name)
    keys = _keys(builder, name)
    shape = _image_shape(builder, keys, name)
    seen_shape(config, shape)  # before a long download
    path = pathlib.Path(builder.data_path)
    if builder.is_prepared():
        tell(f'{path}: is prepared already')
    else:
        tell(f'{path}: is being prepared; what is downloaded stays in {path.parents[1]}/downloads')
        _prepare(builder, config, name)
    return builder, keys, shape


def examples(config: ConfigDict, name: str) -> tuple[Examples, Examples, int]:
    """Returns the images of train and of test, and the number of classes.

    A set that is not prepared yet is prepared first.

    Raises:
      UserError: no such set, not image classification, or not to be had; with the remedy.
    """
    builder, keys, shape = _prepared(config, name, lambda words: None)
    train, test = (
        _Split(builder, split, keys, shape) for split in _split_names(builder, config, name)
    )
    return train, test, builder.info.features[keys.label].num_classes
