"""Evaluation counts every image once, whatever the batch."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PAIR, softmax, tiny_config

from afkd_jax.data import augment
from afkd_jax.devices import mesh
from afkd_jax.errors import UserError
from afkd_jax.method import metrics
from afkd_jax.report import summary
from afkd_jax.training import evaluate
from afkd_jax.training import run as run_lib


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(mesh, 'available', lambda: jax.devices()[:1])


@functools.cache
def plain(networks=PAIR):
    """Returns accuracy and cross-entropy of untrained networks on test, computed in the test."""
    run = run_lib.prepare(tiny_config(networks))
    state = jax.device_get(run.initial_state())
    indices = run.info.indices('test')
    table = jax.device_get(run.pipeline.images)
    pixels = table.pixels[indices.start : indices.stop] / 255
    pixels = ((pixels - table.mean) / table.std).astype(np.float32)
    labels = table.labels[indices.start : indices.stop]
    probabilities = []
    for module, network in zip(run.cohort.networks, state.networks, strict=True):
        apply = jax.jit(functools.partial(module.apply, train=False))
        logits = np.asarray(apply(network.variables(), pixels)[0], np.float64)
        probabilities.append(softmax(logits))
    probabilities.append(np.mean(probabilities, axis=0))
    accuracy = [100 * float((p.argmax(1) == labels).mean()) for p in probabilities]
    entropy = [-np.log(p[np.arange(len(labels)), labels]).mean() for p in probabilities]
    return accuracy, entropy


@pytest.mark.parametrize('batch_size', [7, 64, 359, 512])
def test_scores_equal_a_plain_computation_for_any_batch(batch_size, one_device):
    # 359 test images: none of 7, 64 and 512 divides them.
    run = run_lib.prepare(tiny_config(eval_batch_size=batch_size))
    assert run.info.test == 359
    scores = evaluate.Evaluator(run)(run.initial_state().networks, 'test')
    accuracy, entropy = plain()
    np.testing.assert_allclose(scores.accuracy, accuracy, rtol=1e-6)
    np.testing.assert_allclose(scores.cross_entropy, entropy, rtol=1e-4)


def test_what_fills_up_the_last_batch_is_not_counted(one_device):
    # With its own predictions as labels a network is always right: one place counted twice
    # would give more than 100 %.
    run = run_lib.prepare(tiny_config(eval_batch_size=512))
    networks = run.initial_state().networks
    every = np.arange(run.pipeline.images.labels.size)
    images, _ = augment.evaluation_batch(run.pipeline.images, every)
    logits, _ = jax.jit(functools.partial(run.cohort.networks[0].apply, train=False))(
        networks[0].variables(), images
    )
    labels = run.devices.replicate(logits.argmax(1).astype(np.int32))
    pipeline = dataclasses.replace(run.pipeline, images=run.pipeline.images.replace(labels=labels))
    scores = evaluate.Evaluator(dataclasses.replace(run, pipeline=pipeline))(networks, 'test')
    assert scores.accuracy[0] == 100.0


def test_an_evaluation_of_no_image_is_an_error(one_device, monkeypatch):
    run = run_lib.prepare(tiny_config(eval_batch_size=512))
    whole, networks = run.pipeline.evaluation, run.initial_state().networks

    @contextlib.contextmanager
    def none_decoded(_, indices):
        with whole(indices) as batches:
            yield ((images, index, mask & False) for images, index, mask in batches)

    monkeypatch.setattr(type(run.pipeline), 'evaluation', none_decoded)
    with pytest.raises(UserError, match='none of the images of test could be decoded'):
        evaluate.Evaluator(run)(networks, 'test')


@pytest.mark.parametrize('mapping', ['shard_map', 'pmap'])
def test_eight_devices_score_the_same(mapping):
    run = run_lib.prepare(tiny_config(eval_batch_size=64, mapping=mapping))
    assert run.devices.mesh.size == 8
    scores = evaluate.Evaluator(run)(run.initial_state().networks, 'test')
    accuracy, entropy = plain()
    np.testing.assert_allclose(scores.accuracy, accuracy, rtol=1e-6)
    np.testing.assert_allclose(scores.cross_entropy, entropy, rtol=1e-4)


def test_networks_on_several_devices_start_and_score_the_same():
    whole = run_lib.prepare(tiny_config())
    spread = run_lib.prepare(tiny_config(eval_batch_size=64, mesh__peer=2))
    state = spread.initial_state()
    assert spread.fingerprint(state) == whole.fingerprint(whole.initial_state())
    scores = evaluate.Evaluator(spread)(state.networks, 'test')
    accuracy, entropy = plain()
    np.testing.assert_allclose(scores.accuracy, accuracy, rtol=1e-6)
    np.testing.assert_allclose(scores.cross_entropy, entropy, rtol=1e-4)


def test_counts_of_predictions_equal_numpy():
    rng = np.random.default_rng(0)
    for classes in (10, 12, 101):
        # Whole numbers, so that many are equal: then the first class is ahead.
        log_p = rng.integers(0, 6, (3, 200, classes)).astype(np.float32)
        labels = rng.integers(0, classes, 200)
        mask = rng.random(200) < 0.8
        log_p[2, :9] = np.nan  # as of a network that has diverged: never right
        order = np.argsort(-log_p, axis=-1, kind='stable')
        order[2, :9] = -1
        counts = jax.device_get(metrics.prediction_counts(jnp.array(log_p), labels, mask))
        correct = np.zeros((3, classes), int)
        confusion = np.zeros((3, classes, classes), int)
        for k in range(3):
            for i in np.flatnonzero(mask):
                correct[k, labels[i]] += order[k, i, 0] == labels[i]
                confusion[k, labels[i], max(order[k, i, 0], 0)] += 1
        np.testing.assert_array_equal(counts['correct'], correct)
        assert ('confusion' in counts) == (classes <= 100)
        if classes <= 100:
            np.testing.assert_array_equal(counts['confusion'], confusion)
            diagonal = np.diagonal(counts['confusion'], axis1=1, axis2=2)
            np.testing.assert_array_equal(diagonal[:2], correct[:2])
        assert ('top5' in counts) == (classes > 10)
        if classes > 10:
            five = (order[..., :5] == labels[None, :, None]).any(-1) & mask
            np.testing.assert_array_equal(counts['top5'], five.sum(1))


def test_by_class_the_images_and_the_accuracy_add_up(one_device):
    run = run_lib.prepare(tiny_config(eval_batch_size=64))
    scores = evaluate.Evaluator(run)(run.initial_state().networks, 'test')
    found = summary.classes(run.cohort, scores)
    json.dumps(found)
    indices = run.info.indices('test')
    labels = np.asarray(run.pipeline.images.labels)[indices.start : indices.stop]
    assert found['images'] == np.bincount(labels, minlength=10).tolist()
    for entry, accuracy in zip(
        [*found['networks'], found['ensemble']], scores.accuracy, strict=True
    ):
        confusion = np.array(entry['confusion'])
        assert confusion.sum(1).tolist() == found['images']
        assert 100 * np.trace(confusion) / 359 == pytest.approx(accuracy)
        weights = np.array(found['images']) / 359
        assert np.dot(entry['accuracy'], weights) == pytest.approx(accuracy)
    assert scores.top5 is None
