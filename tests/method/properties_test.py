"""Any input works or is rejected with a one-line error: never a traceback, never a hang.

More examples, of other seeds:
HYPOTHESIS_EXAMPLES=2000 python -m pytest tests/method/properties_test.py
"""

import gzip
import os
import struct

import hypothesis
import numpy as np
from conftest import tiny_config
from hypothesis import strategies as st

from afkd_jax import config as config_lib
from afkd_jax.data import dataset as dataset_lib
from afkd_jax.errors import UserError

MORE = os.environ.get('HYPOTHESIS_EXAMPLES')


def examples(count):
    return hypothesis.settings(
        max_examples=int(MORE or count),
        derandomize=not MORE,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


SHAPE = st.sampled_from([0, 1, 3, 8, 28, 255, 2**16, 2**32 - 1])


@st.composite
def idx_files(draw):
    """Draws the bytes of the four files: well-formed ones, with up to three changes."""
    files = {}
    for prefix, count in (('train', draw(st.sampled_from([0, 1, 20, 64]))), ('t10k', 12)):
        images = struct.pack('>4I', 2051, count, 8, 8) + bytes(count * 64)
        labels = struct.pack('>2I', 2049, count) + bytes(i % 3 for i in range(count))
        files |= {
            f'{prefix}-images-idx3-ubyte.gz': images,
            f'{prefix}-labels-idx1-ubyte.gz': labels,
        }
    compressed = {name: gzip.compress(content, mtime=0) for name, content in files.items()}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(files)))
        content = bytearray(files[name])
        kind = draw(st.sampled_from(['byte', 'header', 'cut', 'longer', 'raw', 'noise', 'gone']))
        if kind == 'byte':
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
        elif kind == 'header':
            start = 4 * draw(st.integers(0, len(content) // 4 - 1 if len(content) < 20 else 3))
            content[start : start + 4] = struct.pack('>I', draw(SHAPE))
        elif kind == 'cut':
            del content[draw(st.integers(0, len(content))) :]
        elif kind == 'longer':
            content += draw(st.binary(max_size=40))
        compressed[name] = gzip.compress(bytes(content), mtime=0)
        if kind == 'raw':  # of the compressed bytes
            raw = bytearray(compressed[name])
            raw[draw(st.integers(0, len(raw) - 1))] ^= draw(st.integers(1, 255))
            compressed[name] = bytes(raw)
        elif kind == 'noise':
            compressed[name] = draw(st.binary(max_size=200))
        elif kind == 'gone':
            compressed[name] = None
    return compressed


@examples(300)
@hypothesis.given(files=idx_files())
def test_any_idx_files_are_read_or_rejected_with_one_line(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp('idx')
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
    config = tiny_config(dataset=f'idx:{folder}', batch_size=8)
    message = None
    try:
        dataset = dataset_lib.dataset(config)
        images = dataset.load()
    except UserError as error:
        message = str(error)
    if message:
        assert message.startswith('config.')
        assert '\n' not in message
        return
    info = dataset.info
    assert images.pixels.dtype == np.uint8
    assert images.pixels.shape == (info.examples, *info.image_shape)
    assert images.labels.shape == (info.examples,)
    assert all(0 <= label < info.num_classes for label in images.labels)
    assert min(info.image_shape) > 0
    assert info.test > 0
    assert info.train >= 8


FIELDS = sorted(config_lib.DEFAULTS)
NAMES = st.one_of(
    st.sampled_from(FIELDS),
    st.sampled_from(
        ['loss', 'data', 'logit', '', '.', 'epoch', 'loss.', 'data.pad.x', '__class__']
    ),
    st.text(max_size=12),
)
NUMBERS = st.one_of(st.integers(-3, 400), st.integers(), st.floats(), st.booleans())
WORDS = st.sampled_from(
    ['resnet8', 'wrn-16-1', 'resnet9', 'digits', 'idx:/tmp', 'tfds:mnist', 'tfds:', 'kd_ring',
     'all+l1', 'l1+all', 'cosine', 'skip', 'pmap', 'None', '()', "('resnet8','wrn-10-1')", '(2,1)',
     '(0.2,0.1)', '[]', '{}', '1e400', '-0', '0x10', '1_000', "'", '(', '((1,),)']
)  # fmt: skip
VALUES = st.one_of(
    NUMBERS.map(repr), WORDS, st.lists(NUMBERS | WORDS, max_size=3).map(tuple).map(repr), st.text()
)


@examples(80)
@hypothesis.given(overrides=st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=2))
def test_any_override_is_accepted_or_rejected_with_one_line(overrides, forked):
    arguments = [f'--config.{name}={value}' for name, value in overrides]
    code, output, errors = forked(['--config=configs/digits.py', '--mode=describe', *arguments])
    if code == 0:
        assert 'network 1: ' in output
    else:
        assert code == 1, (code, output, errors)
        assert errors.startswith('error: '), errors
        assert len(errors.splitlines()) == 1, errors
    assert 'Traceback' not in errors
