"""Convolutions: their forms on CPUs against XLA's convolution."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_difference

from afkd_jax.devices import convolution, mesh
from afkd_jax.devices.mesh import BATCH_SHARDED, REPLICATED
from afkd_jax.devices.spmd import DATA


def convolve(function, x, kernel, stride):
    """Calls the function as Flax does; depthwise where the kernel has one input channel."""
    size = len(kernel)
    return function(
        x,
        kernel,
        (stride, stride),
        [(size // 2, size // 2)] * 2,
        dimension_numbers=jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


ours = functools.partial(convolve, convolution.conv_general_dilated)
reference = functools.partial(convolve, jax.lax.conv_general_dilated)


def random(shape, dtype='float64', seed=0):
    return jnp.asarray(np.random.RandomState(seed).normal(size=shape), dtype)


SHAPES = [  # x, kernel, stride
    ((16, 6, 6, 5), (3, 3, 1, 5), 1),  # depthwise
    ((16, 6, 6, 5), (3, 3, 1, 5), 2),
    ((3, 5, 7, 4), (3, 3, 1, 4), 2),
    ((2, 1, 1, 3), (3, 3, 1, 3), 1),
    ((2, 8, 5, 3), (5, 5, 1, 3), 3),
    ((3, 4, 5, 6), (1, 1, 6, 2), 1),  # a matrix product, in either order, and in parts
    ((3, 4, 5, 2), (1, 1, 2, 6), 1),
    ((8, 32, 32, 2), (1, 1, 2, 3), 1),
    ((3, 5, 5, 6), (1, 1, 6, 2), 2),
    ((2, 4, 4, 256), (3, 3, 256, 4), 2),  # an output smaller than the kernel
    ((2, 3, 3, 256), (3, 3, 256, 4), 2),
    ((3, 5, 7, 4), (3, 3, 4, 3), 2),
]


@pytest.mark.parametrize(('shape', 'kernel', 'stride'), SHAPES)
def test_values_and_gradients_are_those_of_xla(x64, shape, kernel, stride):
    arrays = random(shape), random(kernel, seed=1)
    results = []
    for function in (reference, ours):

        def both(x, kernel, function=function):
            y, pull = jax.vjp(lambda *args: function(*args, stride), x, kernel)
            return y, *pull(jnp.cos(y))

        results.append(jax.jit(both)(*arrays))
    for theirs, mine in zip(*results, strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ('side', 'settings'),
    [
        (2, {'kernel_size': (3, 3), 'feature_group_count': 2}),
        (2, {'kernel_size': (3, 3), 'feature_group_count': 4, 'features': 8}),
        (2, {'kernel_size': (3, 3), 'kernel_dilation': 2}),
        (2, {'kernel_size': (1, 1), 'input_dilation': 2, 'padding': 0}),
        (2, {'kernel_size': (3, 3), 'kernel_dilation': 2, 'feature_group_count': 4}),
        (1, {'kernel_size': (3,)}),
        (3, {'kernel_size': (1, 1, 1)}),
        (2, {'kernel_size': (1, 1), 'padding': 'CIRCULAR', 'strides': 2}),
        (2, {'kernel_size': (3, 3), 'padding': 'CIRCULAR'}),
        (2, {'kernel_size': (3, 3), 'padding': ((-1, 0), (2, -2))}),
        (2, {'kernel_size': (3, 3), 'padding': ((-1, 0), (2, -2)), 'feature_group_count': 4}),
    ],
)
def test_every_layer_of_flax_is_the_same(x64, side, settings):
    """Whatever a network of one's own asks of `Layers.conv`."""
    x = random((2, *side * (6,), 4))
    results = []
    for function in (None, convolution.conv_general_dilated):
        layer = nn.Conv(**{'features': 4} | settings, conv_general_dilated=function)
        variables = layer.init(jax.random.key(0), x)

        def both(variables, x, layer=layer):
            y, pull = jax.vjp(layer.apply, variables, x)
            return y, pull(jnp.cos(y))

        results.append(jax.jit(both)(variables, x))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), *results)


def gradient_text(function, shape, kernel, stride, platform):
    def total(*arrays):
        return jnp.sin(function(*arrays, stride)).sum()

    traced = jax.jit(jax.grad(total, argnums=(0, 1))).trace(random(shape), random(kernel))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ('shape', 'kernel', 'stride', 'convolutions'),
    [
        ((16, 6, 6, 5), (3, 3, 1, 5), 1, 0),
        ((3, 4, 5, 6), (1, 1, 6, 2), 1, 2),
        ((2, 4, 4, 256), (3, 3, 256, 4), 2, 3),
        ((2, 3, 3, 256), (3, 3, 256, 4), 2, 3),
        ((2, 4, 4, 8), (3, 3, 8, 4), 2, 3),
    ],
)
def test_only_programs_for_cpus_have_other_forms(x64, shape, kernel, stride, convolutions):
    def texts(platform):
        return [gradient_text(each, shape, kernel, stride, platform) for each in (ours, reference)]

    mine, plain = texts('cuda')
    assert mine.count('stablehlo.convolution') == plain.count('stablehlo.convolution') == 3
    cpu, _ = texts('cpu')
    assert cpu.count('stablehlo.convolution') == convolutions
    larger = 'x3x3x4xf64>, tensor<3x3'  # an output of 3 x 3 instead of 2 x 2
    assert [larger in text for text in (cpu, mine)] == [kernel[2] == 256, False]


@pytest.mark.slow
@pytest.mark.parametrize(('shape', 'kernel'), [(shape, kernel) for shape, kernel, _ in SHAPES[::3]])
def test_it_can_be_differentiated_again_and_vmapped(x64, shape, kernel):
    x, kernel = random(shape), random(kernel, seed=1)

    def of(function):
        def squared_gradients(x, kernel):
            def cube(x, kernel):
                return (function(x, kernel, 2) ** 3).sum()

            return sum((g**2).sum() for g in jax.grad(cube, (0, 1))(x, kernel))

        return jax.jit(jax.grad(squared_gradients, (0, 1)))  # eager calls have XLA's forms

    for mine, theirs in zip(*(of(f)(x, kernel) for f in (ours, reference)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10)
    kernels = random((5, *kernel.shape), seed=2)
    for axes in ((None, 0), (0, 0)):
        xs = x if axes[0] is None else random((5, *x.shape), seed=3)
        mine, theirs = (jax.vmap(of(function), axes)(xs, kernels) for function in (ours, reference))
        np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-10)
        np.testing.assert_allclose(mine[1], theirs[1], rtol=1e-10)


def test_half_precision_is_summed_in_single():
    x, kernel = random((8, 4, 4, 3), 'bfloat16'), random((3, 3, 1, 3), 'bfloat16', seed=1)
    y, pull = jax.vjp(jax.jit(lambda x, k: ours(x, k, 1)), x, kernel)
    exact, exact_pull = jax.vjp(lambda x, k: reference(x, k, 1), *map(jnp.float32, (x, kernel)))
    for mine, theirs in zip(
        (y, *pull(jnp.ones_like(y))), (exact, *exact_pull(jnp.ones_like(exact))), strict=True
    ):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_array_equal(mine, theirs.astype(jnp.bfloat16))


def test_its_gradients_are_those_of_each_device(x64):
    x, kernel = random((4, 6, 6, 3)), random((3, 3, 1, 3), seed=1)
    devices = mesh.arrange(jax.devices()[:2], 'shard_map')

    def gradients(function):
        def loss(x, kernel):
            return (function(x, kernel, 2) ** 2).sum()

        def step(x, kernel):
            kernel = jax.lax.pcast(kernel, DATA, to='varying')
            to_x, to_kernel = jax.grad(loss, (0, 1))(x, kernel)
            return to_x, jax.lax.psum(to_kernel, DATA)

        specs = BATCH_SHARDED, REPLICATED
        return jax.grad(loss, (0, 1))(x, kernel), devices.map(step, specs, specs)(x, kernel)

    alone, mapped = gradients(ours)
    for one, two, theirs in zip(alone, mapped, gradients(reference)[1], strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-12)
        np.testing.assert_allclose(two, theirs, rtol=1e-12)


@pytest.mark.parametrize('shape', [(3, 3, 3, 3), (3, 3, 1, 3)])
def test_images_or_kernels_may_be_the_same_on_every_device(x64, shape):
    """As in a network that convolves a constant, and in a loss of replicated kernels."""
    x, kernel, grid = random((4, 5, 5, 3)), random(shape, seed=1), random((1, 5, 5, 3), seed=2)
    devices = mesh.arrange(jax.devices()[:2], 'shard_map')

    def loss(kernel, x):
        return (x * ours(grid, kernel, 1) ** 2 + ours(x, kernel, 1)).sum((1, 2, 3)).mean()

    def of_own_kernels(kernel, x):
        own = jax.lax.pcast(kernel, DATA, to='varying')
        return jax.lax.pmean(jax.grad(loss)(own, x), DATA)

    def of_replicated_kernels(kernel, x):
        return jax.grad(lambda *arrays: jax.lax.pmean(loss(*arrays), DATA))(kernel, x)

    for step in (of_own_kernels, of_replicated_kernels):
        found = devices.map(step, (REPLICATED, BATCH_SHARDED))(kernel, x)
        np.testing.assert_allclose(found, jax.grad(loss)(kernel, x), rtol=1e-12)


def gradients(x, kernel, platform):
    """Returns the gradients of a strided convolution, as compiled, and as lowered text."""

    def loss(convolve, x, kernel):
        y = convolve(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        return jnp.sin(y).sum()

    for convolve in (convolution.conv_general_dilated, jax.lax.conv_general_dilated):
        both = jax.jit(jax.grad(functools.partial(loss, convolve), argnums=(0, 1)))
        yield both(x, kernel), both.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(('side', 'channels'), [(4, 256), (3, 256), (4, 8), (8, 256)])
def test_gradients_of_small_outputs_are_those_of_larger_ones_on_a_cpu(x64, side, channels):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, side, side, channels))
    kernel = rng.standard_normal((3, 3, channels, 4)) / 30
    (ours, text), (plain, plain_text) = gradients(x, kernel, 'cpu')
    assert relative_difference(ours, plain)[0] < 1e-12
    larger = side < 8 and channels >= 256
    assert ('x3x3x4x' in text) == larger
    assert 'x3x3x4xf64>, tensor<3x3' not in plain_text
    (_, text), (_, plain_text) = gradients(x, kernel, 'cuda')
    assert text.count('stablehlo.convolution') == plain_text.count('stablehlo.convolution')
    assert 'x3x3x4x' not in text


def test_gradients_of_small_outputs_can_be_differentiated(x64):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 4, 4, 256)), rng.standard_normal((3, 3, 256, 4)) / 30
    layout = ('NHWC', 'HWIO', 'NHWC')

    def penalty(convolve, x, kernel):
        def total(x):
            return jnp.sin(
                convolve(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout)
            ).sum()

        return jnp.square(jax.grad(total)(x)).sum()

    ours, plain = (
        jax.jit(jax.grad(functools.partial(penalty, convolve), argnums=(0, 1)))(x, kernel)
        for convolve in (convolution.conv_general_dilated, jax.lax.conv_general_dilated)
    )
    assert relative_difference(ours, plain)[0] < 1e-12
