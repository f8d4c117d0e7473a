"""bfloat16: what computes in it, what does not, and that networks learn as well."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    initial_state,
    mapped_update,
    random_batch,
    take_devices,
    tiny_cohort,
    tiny_config,
)

BATCH = 32
SHORT = ('--config=tests/tiny.py:convs,convs', '--config.epochs=3', '--config.method=kd_ring')
PAIR = ('tiny-8-2', 'tiny-6-2')  # the second has a transfer layer


def updated(dtype, method):
    config = tiny_config(PAIR, batch_size=BATCH, method=method, dtype=dtype)
    devices = take_devices(1)
    batch = [devices.split(part) for part in random_batch(BATCH)]
    before = initial_state(config)
    after, values = mapped_update(config, devices)(devices.replicate(before), *batch)
    return before, jax.device_get(after), jax.device_get(values)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['afd', 'l1_kd'])
def test_state_losses_and_values_stay_in_single_precision(method):
    before, after, values = updated('bfloat16', method)
    for leaf in jax.tree.leaves((before, after, values)):
        assert np.asarray(leaf).dtype in (np.float32, np.int32)


def products(dtype):
    """Returns the dtypes of the operands of all convolutions and products of a step."""
    config = tiny_config(PAIR, batch_size=BATCH, dtype=dtype)
    devices = take_devices(1)
    batch = [devices.split(part) for part in random_batch(BATCH)]
    step = mapped_update(config, devices).trace(devices.replicate(initial_state(config)), *batch)
    found = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ('conv_general_dilated', 'dot_general'):
                found.update(str(operand.aval.dtype) for operand in equation.invars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(step.jaxpr.jaxpr)
    return found


def test_every_convolution_and_product_computes_in_it():
    assert products('bfloat16') == {'bfloat16'}
    assert products('float32') == {'float32'}


def test_logits_are_single_and_maps_are_not():
    cohort = tiny_cohort(tiny_config(PAIR, dtype='bfloat16'))
    images, _ = random_batch(4)
    (logits, maps), _ = cohort.networks[0].init_with_output(jax.random.key(0), images, True)
    assert (logits.dtype, maps.dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize('method', ['afd', 'l1_kd'])
def test_gradients_are_those_of_single_precision_to_its_digits(method):
    # Momentum, after the first step, is the gradient of the logit loss (and weight decay). bfloat16
    # has 8 bits: a rounding is up to 0.4 %; they add up along the network, and some images change
    # sides at a ReLU.
    _, single, values = updated('float32', method)
    _, half, half_values = updated('bfloat16', method)
    for one, two in zip(single.networks, half.networks, strict=True):
        for a, b in zip(
            jax.tree.leaves(one.opt['logit']), jax.tree.leaves(two.opt['logit']), strict=True
        ):
            assert np.linalg.norm(a - b) < 0.08 * np.linalg.norm(a)
    differences = [
        np.abs(half_values[name] / values[name] - 1).max() for name in values if name != 'accuracy'
    ]
    assert 0 < max(differences) < 0.03
    for name in ('cross_entropy', 'mimicry_kl'):
        np.testing.assert_allclose(half_values[name], values[name], rtol=0.02)


@pytest.mark.slow
def test_a_short_training_ends_as_well(tmp_path, forked):
    found, fingerprints = {}, set()
    for dtype in ('float32', 'bfloat16'):
        command = [*SHORT, f'--config.dtype={dtype}', f'--workdir={tmp_path / dtype}']
        code, _, errors = forked(command, {'XLA_FLAGS': ''})  # it computes more than it compiles
        assert code == 0, errors
        summary = json.loads((tmp_path / dtype / 'summary.json').read_text())
        found[dtype] = [entry['test_accuracy'] for entry in summary['networks']]
        fingerprints.add(summary['fingerprint'])
    # 359 images: one standard error is 1.2 points at 95 %.
    assert min(min(values) for values in found.values()) > 90
    assert np.abs(np.subtract(*found.values())).max() < 3
    assert len(fingerprints) == 2
