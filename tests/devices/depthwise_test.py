"""Depthwise convolution: its form on CPUs against XLA's convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afkd_jax.devices import depthwise, mesh
from afkd_jax.devices.mesh import BATCH_SHARDED, REPLICATED
from afkd_jax.devices.spmd import DATA


def reference(x, kernel, stride):
    size = len(kernel)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(size // 2, size // 2)] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1],
    )


def random(shape, dtype='float64', seed=0):
    return jnp.asarray(np.random.RandomState(seed).normal(size=shape), dtype)


SHAPES = [  # x, kernel, stride
    ((16, 6, 6, 5), 3, 1),
    ((16, 6, 6, 5), 3, 2),
    ((3, 5, 7, 4), 3, 2),
    ((2, 1, 1, 3), 3, 1),
    ((2, 8, 5, 3), 5, 3),
]


@pytest.mark.parametrize(('shape', 'size', 'stride'), SHAPES)
def test_values_and_gradients_are_those_of_the_convolution(x64, shape, size, stride):
    x, kernel = random(shape), random((size, size, 1, shape[-1]), seed=1)
    results = []
    for function in (reference, depthwise.convolution):

        def both(x, kernel, g=None, function=function):
            y, pull = jax.vjp(lambda *args: function(*args, stride), x, kernel)
            return y, *pull(jnp.cos(y))

        results.append(jax.jit(both)(x, kernel))
    for theirs, mine in zip(*results, strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_it_can_be_differentiated_again_and_vmapped(x64):
    x, kernel = random((2, 4, 4, 3)), random((3, 3, 1, 3), seed=1)

    def of(function):
        def squared_gradients(x, kernel):
            def cube(x, kernel):
                return (function(x, kernel, 2) ** 3).sum()

            return sum((g**2).sum() for g in jax.grad(cube, (0, 1))(x, kernel))

        return jax.grad(squared_gradients, (0, 1))

    for mine, theirs in zip(
        *(of(f)(x, kernel) for f in (depthwise.convolution, reference)), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10)
    kernels = random((5, 3, 3, 1, 3), seed=2)
    for axes in ((None, 0), (0, 0)):
        xs = x if axes[0] is None else random((5, *x.shape), seed=3)
        mine, theirs = (
            jax.vmap(of(function), axes)(xs, kernels)
            for function in (depthwise.convolution, reference)
        )
        np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-10)
        np.testing.assert_allclose(mine[1], theirs[1], rtol=1e-10)


def test_half_precision_is_summed_in_single():
    x, kernel = random((8, 4, 4, 3), 'bfloat16'), random((3, 3, 1, 3), 'bfloat16', seed=1)
    y, pull = jax.vjp(jax.jit(lambda x, k: depthwise.convolution(x, k, 1)), x, kernel)
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

    alone, mapped = gradients(depthwise.convolution)
    for one, two, theirs in zip(alone, mapped, gradients(reference)[1], strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-12)
        np.testing.assert_allclose(two, theirs, rtol=1e-12)
