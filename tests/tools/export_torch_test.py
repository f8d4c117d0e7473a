"""An exported ResNet in PyTorch, as docs/using.md describes the file; skipped without PyTorch."""

import jax
import numpy as np
import pytest
from conftest import tiny_config

from afkd_jax.checkpoints import weights
from afkd_jax.checkpoints.artefact import ImageFacts
from afkd_jax.data.dataset import Info
from afkd_jax.models import build
from afkd_jax.tools import export
from afkd_jax.tools.model import Model

torch = pytest.importorskip('torch')
load_file = pytest.importorskip('safetensors.torch').load_file


def conv_norm(tensors, conv, norm, x, stride=1):
    kernel = tensors[f'trunk/{conv}/kernel'].permute(3, 2, 0, 1)  # to [out, in, height, width]
    x = torch.nn.functional.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2)
    mean, var = (tensors[f'batch_stats/trunk/{norm}/{name}'] for name in ('mean', 'var'))
    scale, bias = (tensors[f'trunk/{norm}/{name}'] for name in ('scale', 'bias'))
    return torch.nn.functional.batch_norm(x, mean, var, scale, bias, eps=1e-5)


def resnet20(tensors, x):
    """A ResNet-20 for small images, written here from the paper, on [B, C, H, W]."""
    x = conv_norm(tensors, 'conv', 'norm', x).relu()
    for stage in (1, 2, 3):
        for number in (1, 2, 3):
            block = f'stage{stage}_block{number}'
            stride = 2 if stage > 1 and number == 1 else 1
            y = conv_norm(tensors, f'{block}/conv1', f'{block}/norm1', x, stride).relu()
            y = conv_norm(tensors, f'{block}/conv2', f'{block}/norm2', y)
            if stride == 2:
                x = conv_norm(tensors, f'{block}/conv_short', f'{block}/norm_short', x, stride)
            x = (x + y).relu()
    dense = 'head/Dense_0'
    return x.mean((2, 3)) @ tensors[f'{dense}/kernel'] + tensors[f'{dense}/bias']


def test_an_exported_resnet_has_the_same_logits_in_pytorch(tmp_path):
    shape, rng = (32, 32, 3), np.random.default_rng(0)
    network = build('resnet20', 10, shape)
    variables = network.init(jax.random.key(0), np.zeros((1, *shape), np.float32), False)
    # Statistics and affine parameters of a trained network are not those of a new one.
    variables = {
        'params': variables['params'],
        'batch_stats': jax.tree.map(
            lambda leaf: leaf + rng.uniform(0, 0.5, leaf.shape).astype(np.float32),
            variables['batch_stats'],
        ),
    }
    classes = tuple('abcdefghij')
    facts = ImageFacts('x', Info(shape, classes, 1, 0, 1), (0.5, 0.4, 0.3), (0.2, 0.3, 0.2))
    model = Model('1 resnet20', ['resnet20'], tiny_config(), facts, [(network, variables)], 0)
    path = tmp_path / 'resnet20.safetensors'
    path.write_bytes(export.safetensors(model))
    assert weights.read(str(path)).classes == classes
    images = rng.standard_normal((8, *shape)).astype(np.float32)
    logits, _ = network.apply(variables, images, False)
    with torch.no_grad():
        found = resnet20(load_file(path), torch.from_numpy(images).permute(0, 3, 1, 2))
    assert np.abs(logits).max() > 0.1
    np.testing.assert_allclose(found.numpy(), logits, atol=1e-4)
