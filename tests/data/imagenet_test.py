"""A set like ImageNet, from its files to the end of an epoch: 1,000 classes of JPEGs, shrunken."""

import io
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import tiny_config
from PIL import Image
from sklearn.datasets import load_sample_image

from afkd_jax.config import Config
from afkd_jax.data import dataset as dataset_lib
from afkd_jax.devices import mesh as parallel
from afkd_jax.devices.signals import Interrupt
from afkd_jax.errors import UserError
from afkd_jax.training import loop as train
from configs import imagenet

pytestmark = pytest.mark.usefixtures('compiled_once')
CLASSES, TRAIN, TEST = 1000, 96, 40


def picture(number):
    """Returns a JPEG of 20 x 30 .. 83 x 93 pixels, cut out of a photograph."""
    photo, rng = load_sample_image('flower.jpg'), np.random.default_rng(number)
    left, top = rng.integers(0, 500), rng.integers(0, 300)
    cut = photo[top : top + 20 + number % 64, left : left + 30 + number % 64]
    file = io.BytesIO()
    Image.fromarray(cut).convert('L' if number == 7 else 'RGB').save(file, 'JPEG')
    return file.getvalue()


def label(number):
    return number * 37 % CLASSES


class JpegsOfManySizes(tfds.core.GeneratorBasedBuilder):
    """What imagenet2012 is to TFDS: JPEGs as they are, of many sizes, and a validation split."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(encoding_format='jpeg'),
                    'label': tfds.features.ClassLabel(num_classes=CLASSES),
                }
            ),
            supervised_keys=('image', 'label'),
        )

    def _split_generators(self, dl_manager):
        return {
            'train': self._generate_examples(0, TRAIN),
            'validation': self._generate_examples(TRAIN, TRAIN + TEST),
        }

    def _generate_examples(self, first, last):
        for number in range(first, last):
            image = io.BytesIO(picture(number))
            yield number, {'image': image, 'label': label(number)}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp('tfds')


def shrunken(data_dir, **fields):
    """Returns the ImageNet config with small images, networks and batches: one epoch."""
    return Config.of(imagenet.get_config()).replace(
        **{
            'networks': tiny_config().networks,
            'dataset': 'tfds:jpegs_of_many_sizes',
            'epochs': 1,
            'batch_size': 8,
            'eval_batch_size': 16,
            'log_every': 3,
            'data.image_size': 8,
            'data.eval_resize': 9,
            'data.data_dir': str(data_dir),
            **{name.replace('__', '.'): value for name, value in fields.items()},
        }
    )


@pytest.fixture(scope='module')
def epoch(data_dir, tmp_path_factory):
    """Returns (workdir, summary) of an epoch of AFD."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, 'available', lambda: jax.devices()[:2])
        workdir = tmp_path_factory.mktemp('epoch')
        with Interrupt() as interrupt:
            return workdir, train.train(shrunken(data_dir), workdir, None, interrupt)


def test_it_is_prepared_and_read_as_it_is_stored(epoch, data_dir):
    dataset = dataset_lib.dataset(shrunken(data_dir))
    classes = tuple(map(str, range(CLASSES)))
    assert dataset.info == dataset_lib.Info((8, 8, 3), classes, TRAIN, 0, TEST)
    stored = sorted(dataset[index] for index in range(TRAIN + TEST))
    assert stored == sorted((picture(n), label(n)) for n in range(TRAIN + TEST))
    assert dataset.name(0).startswith('record ')
    assert dataset.name(0).endswith('array_record-00000-of-00001')


def test_parts_of_splits_are_taken(epoch, data_dir):
    fields = {'data__train_split': 'train[25%:75%]', 'data__test_split': 'train[:10]'}
    dataset = dataset_lib.dataset(shrunken(data_dir, **fields))
    info = dataset.info
    assert (info.train, info.validation, info.test) == (TRAIN // 2, 0, 10)
    whole = dataset_lib.dataset(shrunken(data_dir))
    train = {whole.train.examples[i] for i in range(24, 72)}
    assert {dataset[index] for index in range(48)} == train
    assert dataset.fingerprint() != whole.fingerprint()
    where = dict(zip(dataset.train.indices.tolist(), range(48), strict=True))
    assert dataset.name(where[0]).startswith('record 24 of ')
    with pytest.raises(
        UserError, match=r'config.data.test_split: .* no split "dev", but train, val'
    ):
        dataset_lib.dataset(shrunken(data_dir, data__test_split='dev'))


def test_an_epoch_of_afd_ends(epoch):
    workdir, summary = epoch
    assert summary['finished']
    assert summary['steps'] == 12
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    entropy = [row['networks'][0]['cross_entropy'] for row in rows if row['kind'] == 'train']
    assert len(entropy) == 4
    assert abs(entropy[0] - np.log(CLASSES)) < 2
    assert all('discriminator' in row['networks'][0] for row in rows if row['kind'] == 'train')


def test_stopped_in_mid_epoch_it_continues_to_the_bit(epoch, data_dir, tmp_path, monkeypatch):
    # First with a worker, unlike the run that was not stopped, then without, unlike before.
    monkeypatch.setattr(parallel, 'available', lambda: jax.devices()[:2])
    asked = []

    class Stop:
        @property
        def requested(self):
            asked.append(1)
            return len(asked) > 5

    fields = {'checkpoint__every_steps': 5}
    assert (
        train.train(shrunken(data_dir, data__workers=0, **fields), tmp_path, None, Stop()) is None
    )
    assert 0 < json.loads((tmp_path / 'summary.json').read_text())['steps'] < 12
    with Interrupt() as interrupt:
        config = shrunken(data_dir, data__workers=0, **fields)
        summary = train.train(config, tmp_path, None, interrupt)
    assert summary['fingerprint'] == epoch[1]['fingerprint']
