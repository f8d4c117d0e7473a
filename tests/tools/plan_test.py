"""--mode plan: figures by hand, messages, and TPUs that are not attached."""

import dataclasses
import importlib.util
import json

import forks
import jax
import numpy as np
import pytest
from conftest import take_devices, tiny_config

from afkd_jax.data import dataset
from afkd_jax.devices import convolution_forms, mesh
from afkd_jax.devices import memory as memory_lib
from afkd_jax.errors import UserError
from afkd_jax.tools import gpu, plan, tpu

HAVE_TPU_COMPILER = importlib.util.find_spec('libtpu') is not None
HAVE_GPU_COMPILER = importlib.util.find_spec('jax_cuda13_plugin') is not None


def planned(monkeypatch, config, count=8, memory=None, **arguments):
    monkeypatch.setattr(mesh, 'available', lambda: jax.devices()[:count])
    if memory:
        monkeypatch.setattr(memory_lib, 'device_bytes', lambda device: memory)
    return plan.plan(config, None, arguments.get('search', False))


@pytest.mark.parametrize('peers', [1, 2])
def test_the_bytes_of_a_small_state_are_those_counted_by_hand(monkeypatch, peers):
    config = tiny_config(('tiny-8-2', 'tiny-8-2'), mesh__peer=peers)
    result = planned(monkeypatch, config)
    # Images of digits are 8x8x1, maps 4x4x8.
    trunk = 3 * 3 * 1 * 8 + 2 * 8  # convolution, norm
    head = 8 * 10 + 10
    discriminator = 3 * 3 * 8 * 8 + 2 * 8 + 2 * 2 * 8 + 1  # convolution, norm, convolution over 2x2
    parts = result['bytes_per_device']
    networks = 2 // peers
    assert parts['parameters'] == networks * 4 * (trunk + head + discriminator)
    assert parts['batch_statistics'] == networks * 4 * 2 * 8
    # Momentum of trunk and head; both moments and a count of Adam, of trunk and of discriminator.
    adam = 2 * (trunk + discriminator) + 2
    assert parts['optimizer_states'] == networks * 4 * (trunk + head + adam)
    whole = (parts['images_and_other_arguments'], parts['temporaries'], parts['program'])
    rest = sum(parts[name] for name in ('parameters', 'batch_statistics', 'optimizer_states'))
    # What comes out is what went in, in the same memory, but for the sums of the log line.
    assert 0 <= parts['total'] - rest - sum(whole) < 1000
    images = 1797 * (64 + 4)
    assert images < parts['images_and_other_arguments'] < images + 2000
    assert result['mesh'] == {'peer': peers, 'data': 8 // peers}
    assert result['fits'] is True


def test_the_operations_are_those_of_the_convolutions(monkeypatch):
    # Wide, so that nothing else counts: a resnet8 of 128, 256 and 512 channels, on 8x8 images.
    config = tiny_config(('resnet8x8', 'resnet8x8'), method='vanilla', batch_size=128)
    monkeypatch.setattr(convolution_forms, '_MANY', 1 << 30)  # no zeros after outputs of 2x2
    result = planned(monkeypatch, config, count=1)

    def taps(size, stride):  # of a 3x3 kernel with a padding of 1: those that hit the image
        return sum(
            sum(0 <= i * stride + d < size for d in (-1, 0, 1)) for i in range(-(-size // stride))
        )

    def conv(size, stride, inputs, outputs, kernel=3):
        positions = taps(size, stride) if kernel == 3 else -(-size // stride)
        return positions**2 * inputs * outputs

    forward = conv(8, 1, 1, 128)  # no gradient to the images is taken
    twice = 2 * conv(8, 1, 128, 128)
    twice += conv(8, 2, 128, 256) + conv(4, 1, 256, 256) + conv(8, 2, 128, 256, kernel=1)
    twice += conv(4, 2, 256, 512) + conv(2, 1, 512, 512) + conv(4, 2, 256, 512, kernel=1)
    operations = 2 * 2 * (2 * forward + 3 * (twice + 512 * 10))  # two networks, two a multiply-add
    assert result['flops_per_image'] == pytest.approx(operations, rel=0.02)
    assert result['flops_per_step'] == pytest.approx(128 * operations, rel=0.02)
    # The networks alone, by the formula that counts taps on the padding too.
    assert len(result['networks']) == 2
    assert result['networks'][0]['flops_per_image'] > operations / 2


def test_network_figures_are_per_network(monkeypatch):
    config = tiny_config(('tiny-8-2', 'tiny-16-2'), method='vanilla')
    first, second = planned(monkeypatch, config, count=1)['networks']
    # 16 (4x4) x 9 taps x channels, forward and the weights' gradient; the head, three times.
    for entry, channels in ((first, 8), (second, 16)):
        assert entry['flops_per_image'] == 2 * (2 * 16 * 9 * channels + 3 * 10 * channels)


def test_a_set_that_is_too_large_is_planned_batch_by_batch(monkeypatch):
    config = tiny_config(batch_size=64, method='vanilla')
    whole = planned(monkeypatch, config, count=2)
    streamed = planned(monkeypatch, config, count=2, memory=10_000)
    assert (whole['images'], streamed['images']) == (
        'the whole set on every device',
        'a batch at a time',
    )
    parts = (result['bytes_per_device'] for result in (whole, streamed))
    first, second = (part['images_and_other_arguments'] for part in parts)
    # Instead of all images, this device's half of a batch.
    assert first - second == (1797 - 32) * (64 + 4)
    assert whole['fits'] is True
    assert streamed['fits'] is False


def test_the_largest_batch_is_found(monkeypatch):
    it = plan.Plan(
        tiny_config(batch_size=64), dataset.Info((8, 8, 1), tuple('0123456789'), 1294, 0, 16), None
    )
    asked = []

    @dataclasses.dataclass(frozen=True)
    class Limited(plan.Plan):
        limit: int = 0

        def fits(self, batch_size):
            asked.append(batch_size)
            assert batch_size % 4 == 0
            return batch_size <= self.limit

    devices = take_devices(4)
    for limit in (3, 4, 63, 100, 511, 512, 700, 10**9):
        asked.clear()
        found = Limited(it.config, it.info, devices, limit).largest_batch(lambda words: None)
        assert len(asked) == len(set(asked)) < 14
        if limit < 4:
            assert found is None
            continue
        best = min(limit, 1294)  # no more than there are images
        assert found <= best
        assert found > best - max(4, best / 8) - 4, limit


def test_a_step_that_does_not_fit_is_reported_with_the_compilers_figures(monkeypatch):
    def reject(self, batch_size):
        raise plan._TooLarge('RESOURCE_EXHAUSTED: Ran out of memory. Used 20.1G of 15.75G hbm.')

    monkeypatch.setattr(plan.Plan, 'compile', reject)
    result = planned(monkeypatch, tiny_config(), count=1)
    assert result['fits'] is False
    assert result['why'] == '20.1G are needed, 15.75G exist'
    assert json.loads(json.dumps(result)) == result
    assert any('it does not fit' in str(part) for part in plan.tables(result))


@pytest.mark.parametrize(
    ('name', 'layout'),
    [
        ('v5e-16', ('v5e', '4x4')),
        ('v5litepod-8', ('v5e', '2x4')),
        ('v5e:2x2', ('v5e', '2x2')),
        ('v4-8', ('v4', '2x2x1')),
        ('v5p-32', ('v5p', '2x2x4')),
        ('v6e-8', ('v6e', '2x4')),
        ('v6e-1', ('v6e', '1x1')),
        ('v3-32', ('v3', '4x4')),
    ],
)
def test_known_tpu_names(name, layout):
    assert tpu.layout_of(name) == layout


@pytest.mark.parametrize('name', ['v5e-17', 'v4-9', 'v9-8', 'a100', 'v5e', 'v5e:4', 'gpu:2x2'])
def test_unknown_tpu_names_are_rejected(name):
    with pytest.raises(UserError, match=f'--topology: .*{name}'):
        tpu.layout_of(name)


@pytest.mark.skipif(HAVE_TPU_COMPILER, reason='the compiler for TPUs is installed')
def test_without_the_compiler_for_tpus_the_error_message_names_the_command(forked):
    command = ['--config=configs/digits.py', '--mode=plan', '--topology=v5e-4']
    code, _, errors = forked(command)
    assert code == 1
    assert errors == (
        'error: --topology: v5e-4 needs the compiler for TPUs, which is not installed: '
        f'python -m pip install "jax[tpu]=={jax.__version__}"\n'
    )


@pytest.mark.skipif(not HAVE_TPU_COMPILER, reason='needs pip install "jax[tpu]"')
def test_a_tpu_that_is_not_attached():
    result = plan.plan(tiny_config(mesh__peer=2), 'v5e-4', False)
    assert result['device'] == '4 x TPU v5 lite, 2 peer x 2 data'
    assert result['memory_per_device'] == 16 * 2**30
    kinds = {(row['operation'], row['axis']) for row in result['collectives']}
    assert ('collective-permute', 'peer') in kinds
    assert ('all-reduce', 'data') in kinds
    assert result['fits']
    assert np.isfinite(result['flops_per_step'])


@pytest.mark.parametrize(
    ('name', 'known'),
    [('h100', True), ('a100-16', True), ('h100-0', False), ('h100:8', False), ('v5e-8', False)],
)
def test_names_of_gpus(name, known):
    assert gpu.is_name(name) == known


@pytest.mark.skipif(HAVE_GPU_COMPILER, reason='the compiler for GPUs is installed')
def test_without_the_compiler_for_gpus_the_error_message_names_the_command():
    message = (
        '--topology: h100-8 needs the compiler for GPUs, .*install "jax.cuda13.==' + jax.__version__
    )
    with pytest.raises(UserError, match=message):
        plan.plan(tiny_config(), 'h100-8', False)


@pytest.mark.skipif(not HAVE_GPU_COMPILER, reason='needs pip install "jax[cuda13]"')
def test_gpus_that_are_not_attached(forked):
    command = ['--config=tests/tiny.py', '--config.dtype=bfloat16', '--mode=plan', '--json']
    code, output, errors = forked([*command, '--topology=h100-2'])
    assert code == 0, errors
    result = json.loads(output)
    assert result['device'] == '2 x NVIDIA H100 80GB HBM3'
    assert result['memory_per_device'] > 80e9
    assert {row['operation'] for row in result['collectives']} == {'all-reduce'}
    assert result['kernels']['convolution'] == sum(result['convolutions'].values())
    assert set(result['convolutions']) == {'bf16, b01f_o01i->b01f'}  # NHWC
    assert 'kernels per step' in errors


def test_the_command_prints_tables_and_json(forked):
    command = ['--config=tests/tiny.py', '--config.method=vanilla', '--mode=plan', '--json']
    code, output, errors = forked(command, forks.environment(2))
    assert code == 0
    result = json.loads(output)
    assert result['device'].startswith('2 x cpu')
    for words in ('optimizer states', 'all-reduce', 'it fits', 'per image, 2 tiny-8-2'):
        assert words in errors
