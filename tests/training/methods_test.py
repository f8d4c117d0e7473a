"""Methods with more state than networks: a resumed run is the uninterrupted one, to the bit."""

import jax
import numpy as np
import pytest
from conftest import tiny_config

from afkd_jax.devices import mesh
from afkd_jax.devices.signals import Interrupt
from afkd_jax.report import figures, jsonl
from afkd_jax.training import evaluate, loop

pytestmark = pytest.mark.usefixtures('compiled_once')
TRIPLE = ('tiny-8-2', 'tiny-4-2', 'tiny-8-2')


def lines(workdir, kind):
    return [line for line in jsonl.read(workdir / 'metrics.jsonl') if line['kind'] == kind]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('method', 'values', 'step_values'),
    [
        pytest.param('afd-ema', {'d_teacher'}, set(), marks=pytest.mark.slow),
        ('one', {'mimicry_kl'}, {'auxiliary_cross_entropy', 'grad_norm_auxiliary'}),
        pytest.param('okddip', {'mimicry_kl'}, {'grad_norm_auxiliary'}, marks=pytest.mark.slow),
        pytest.param('ffl', {'mimicry_kl'}, {'auxiliary_kl'}, marks=pytest.mark.slow),
        ('kdcl_general', {'mimicry_kl', 'teacher_weight'}, set()),
        pytest.param('mcl', {'contrastive', 'contrastive_kl'}, set(), marks=pytest.mark.slow),
        pytest.param('kdcl_linear', {'mimicry_kl'}, set(), marks=pytest.mark.slow),
        pytest.param('shuffled', {'mimicry_kl'}, set(), marks=pytest.mark.slow),
        pytest.param('moments', {'moments'}, set(), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(method, values, step_values, tmp_path, monkeypatch):
    monkeypatch.setattr(mesh, 'available', lambda: jax.devices()[:1])
    drawn = []
    monkeypatch.setattr(figures, '_plot', lambda *_: drawn.append(None))
    averages = {}
    if method in ('one', 'afd-ema'):
        averages = {'ema__decay': 0.5, 'teacher': 'live' if method == 'one' else 'ema'}
    config = tiny_config(
        TRIPLE,
        method=method.removesuffix('-ema'),
        **averages,
        epochs=2,
        batch_size=32,
        data__train_examples=167,
        checkpoint__every_steps=7,
        checkpoint__keep=100,
    )

    def fit(step):
        with Interrupt() as interrupt:
            result = loop.train(config, tmp_path, step, interrupt)
        means = [line['networks'] for line in lines(tmp_path, 'epoch')]
        return result['fingerprint'], result['networks'], means

    whole = fit(None)
    assert fit(7) == whole
    row = lines(tmp_path, 'epoch')[-1]
    assert values <= row['networks'][0].keys()
    assert step_values <= row.keys()
    assert len(drawn) > 0
    if method == 'kdcl_general':  # the weights are of the evaluation before
        first, second = ([row['teacher_weight'] for row in rows] for rows in whole[2])
        np.testing.assert_allclose(first, [1 / 3] * 3, rtol=1e-6)
        assert max(abs(weight - 1 / 3) for weight in second) > 0.01
        assert sum(second) == pytest.approx(1)
    if averages:
        splits = [line['split'] for line in lines(tmp_path, 'evaluation')][-4:]
        assert splits == ['test', 'test_ema', 'validation', 'validation_ema']
        live, average = lines(tmp_path, 'evaluation')[-4:-2]
        for k, network in enumerate(whole[1]):
            assert network['test_accuracy'] == live['networks'][k]['accuracy']
            assert network['test_ema_accuracy'] == average['networks'][k]['accuracy']
        assert live['networks'] != average['networks']
        again = evaluate.evaluate(config, tmp_path, None)['networks']
        assert [row['test_ema_accuracy'] for row in again] == [
            row['test_ema_accuracy'] for row in whole[1]
        ]
