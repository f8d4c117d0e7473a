"""Similarity of maps and predictions against NumPy, over any batches and devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from afkd_jax.devices import mesh
from afkd_jax.training import evaluate
from afkd_jax.training import run as run_lib


def hsic(k, other):
    """Returns the unbiased estimator of HSIC from two matrices of inner products."""
    n = len(k)
    k, other = (m - np.diag(np.diag(m)) for m in (k, other))
    one = np.ones(n)
    value = np.trace(k @ other) + (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
    return (value - 2 / (n - 2) * (one @ k @ other @ one)) / (n * (n - 3))


def prepared(monkeypatch, networks, devices=1, **fields):
    monkeypatch.setattr(mesh, 'available', lambda: jax.devices()[:devices])
    run = run_lib.prepare(tiny_config(networks, **fields))
    return run, run.initial_state()


def outputs(run, state, transfer=True):
    """Returns (predictions, maps as they are compared, own maps, labels) of the test split."""
    images, test = jax.device_get(run.pipeline.images), run.info.indices('test')
    rows = slice(test.start, test.stop)
    pixels = ((images.pixels[rows] / 255 - images.mean) / images.std).astype(np.float32)
    predictions, shared, own = [], [], []
    for k, network in enumerate(state.networks):
        logits, maps = run.cohort.networks[k].apply(network.variables(), pixels, False)
        predictions.append(np.asarray(logits).argmax(1))
        own.append(np.asarray(maps, np.float64))
        if transfer and (module := run.cohort.transfers[k]):
            maps = module.apply(network.transfer_variables(), maps, False)
        shared.append(np.asarray(maps, np.float64))
    return predictions, shared, own, images.labels[rows]


def expected_cka(own, teacher, batch_size):
    """Returns the mean over batches of HSIC, weighted by images, as a quotient."""
    total = np.zeros(3)
    order = np.random.RandomState(0).permutation(len(own))
    own, teacher = own[order], teacher[order]
    for start in range(0, len(own), batch_size):
        a, b = (m[start : start + batch_size].reshape(-1, m[0].size) for m in (own, teacher))
        if len(a) >= 4:
            k, other = a @ a.T, b @ b.T
            total += len(a) * np.array([hsic(k, other), hsic(k, k), hsic(other, other)])
    return total[0] / np.sqrt(total[1] * total[2])


CASES = [
    pytest.param(('tiny-4-2', 'tiny-6-1', 'tiny-4-3'), {'method': 'afd'}, 64, id='transfers'),
    pytest.param(
        ('tiny-4-2', 'tiny-4-2', 'tiny-4-2'),
        {'method': 'vanilla', 'ring_order': (2, 1, 3)},
        512,  # one batch, not full
        id='one shape, another order',
    ),
    pytest.param(('tiny-4-2', 'tiny-6-1'), {'method': 'dml'}, 356, id='no common shape'),
    pytest.param(('tiny-4-2', 'tiny-4-2'), {'method': 'dml'}, 8, id='small batches'),
]


@pytest.mark.parametrize(('networks', 'fields', 'batch_size'), CASES)
def test_the_figures_equal_numpy(networks, fields, batch_size, monkeypatch):
    # 359 test images: 356 leave a last batch of 3, which has no unbiased estimate.
    run, state = prepared(monkeypatch, networks, eval_batch_size=batch_size, **fields)
    edges = evaluate.Evaluator(run).edges(state.networks)
    predictions, shared, own, labels = outputs(run, state)
    order = fields.get('ring_order') or range(1, len(networks) + 1)
    teachers = dict(zip(order, np.roll(order, 1), strict=True))
    assert {edge['network']: edge['teacher'] for edge in edges} == teachers
    for edge in edges:
        k, p = edge['network'] - 1, edge['teacher'] - 1
        if fields['method'] == 'dml' and len({maps.shape for maps in own}) > 1:
            assert [edge[name] for name in ('l1', 'l2', 'cosine')] == [None] * 3
        else:
            a, b = (shared[i].reshape(359, -1) for i in (k, p))
            assert edge['l1'] == pytest.approx(np.abs(a - b).mean(), rel=1e-4)
            assert edge['l2'] == pytest.approx(np.sqrt(((a - b) ** 2).mean()), rel=1e-4)
            norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            assert edge['cosine'] == pytest.approx(((a * b).sum(1) / norms).mean(), rel=1e-4)
        assert edge['cka'] == pytest.approx(expected_cka(own[k], own[p], batch_size), rel=2e-5)
        same, right, teacher_right = (
            predictions[k] == predictions[p],
            predictions[k] == labels,
            predictions[p] == labels,
        )
        assert edge['agreement'] == pytest.approx(100 * same.mean())
        assert edge['disagreement'] == pytest.approx(100 - 100 * same.mean())
        assert edge['only_network_correct'] == pytest.approx(100 * (right & ~teacher_right).mean())
        assert edge['only_teacher_correct'] == pytest.approx(100 * (~right & teacher_right).mean())


@pytest.mark.slow
@pytest.mark.parametrize(('devices', 'mapping'), [(8, 'shard_map'), (2, 'pmap')])
def test_devices_and_mapping_change_nothing(devices, mapping, monkeypatch):
    figures = []
    for count, kind in ((1, 'shard_map'), (devices, mapping)):
        run, state = prepared(
            monkeypatch, ('tiny-4-2', 'tiny-6-1'), count, mapping=kind, eval_batch_size=64
        )
        figures.append(evaluate.Evaluator(run).edges(state.networks))
    for one, many in zip(*figures, strict=True):
        assert one == {name: pytest.approx(value, rel=1e-4) for name, value in many.items()}


def test_equal_networks_are_equal_and_dead_ones_are_not_compared(monkeypatch):
    run, state = prepared(monkeypatch, ('tiny-4-2', 'tiny-4-2'), method='vanilla')
    compare, first = evaluate.Evaluator(run).edges, state.networks[0]
    for edge in compare((first, first)):
        assert edge['l1'] == edge['l2'] == 0
        assert edge['cosine'] == pytest.approx(1)
        assert edge['cka'] == pytest.approx(1)
        assert edge['agreement'] == 100
        assert edge['only_network_correct'] == edge['only_teacher_correct'] == 0
    # A rotation and a scale of the channels leave CKA alone, not the distances; here a swap.
    conv = first.params['trunk']['Conv_0']['kernel']
    trunk = {**first.params['trunk'], 'Conv_0': {'kernel': conv[..., ::-1] * 2}}
    swapped = first.replace(params={**first.params, 'trunk': trunk})
    edge, _ = compare((first, swapped))
    assert edge['cka'] == pytest.approx(1, abs=1e-3)
    assert edge['l1'] > 0
    # A map that is the same for every image has no variance but that of rounding: of zeros, and
    # of numbers that are not.
    for bias in (0.0, 0.1):
        norm = {'scale': jnp.ones(4), 'bias': jnp.full(4, bias)}
        trunk = {**first.params['trunk'], 'Conv_0': {'kernel': conv * 0}, 'BatchNorm_0': norm}
        dead = first.replace(params={**first.params, 'trunk': trunk})
        for edge in (*compare((first, dead)), *compare((dead, dead))):
            assert edge['cka'] is None
    # The figures of a network that has diverged are not finite, which JSON cannot hold.
    trunk = {**first.params['trunk'], 'Conv_0': {'kernel': conv * jnp.nan}}
    diverged = first.replace(params={**first.params, 'trunk': trunk})
    for edge in compare((first, diverged)):
        assert [edge[name] for name in ('l1', 'l2', 'cosine', 'cka')] == [None] * 4
        assert 0 <= edge['agreement'] <= 100


def test_the_order_of_the_test_images_does_not_matter(monkeypatch):
    # Sorted by class, a batch of the stored order would hold hardly more than one of them.
    run, state = prepared(
        monkeypatch, ('tiny-8-2', 'tiny-6-2'), method='vanilla', eval_batch_size=40
    )
    _, _, own, labels = outputs(run, state)
    first = run.info.indices('test').start
    order = np.concatenate([np.arange(first), first + np.argsort(labels, kind='stable')])
    images = run.pipeline.images
    images = images.replace(pixels=images.pixels[order], labels=images.labels[order])
    pipeline = dataclasses.replace(run.pipeline, images=run.devices.replicate(images))
    sorted_run = dataclasses.replace(run, pipeline=pipeline)
    whole = expected_cka(own[0], own[1], 359)
    for each in (run, sorted_run):
        edge, _ = evaluate.Evaluator(each).edges(state.networks)
        assert edge['cka'] == pytest.approx(whole, abs=0.02)


@pytest.mark.slow
def test_sharded_networks_have_the_same_figures(monkeypatch):
    networks = ('tiny-4-2',) * 4
    run, state = prepared(monkeypatch, networks)
    sharded, same = prepared(monkeypatch, networks, devices=4, mesh__peer=2)
    expected = evaluate.Evaluator(run).edges(state.networks)
    for edge, other in zip(evaluate.Evaluator(sharded).edges(same.networks), expected, strict=True):
        assert edge.keys() == other.keys()
        for name, value in edge.items():
            assert value == pytest.approx(other[name], rel=1e-4), name
