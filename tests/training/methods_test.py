"""Methods with more state than networks: a resumed run is the uninterrupted one, to the bit."""

import json

import jax
import pytest
from conftest import tiny_config

from afkd_jax.devices import mesh
from afkd_jax.devices.signals import Interrupt
from afkd_jax.report import figures
from afkd_jax.training import loop

pytestmark = pytest.mark.usefixtures('compiled_once')
TRIPLE = ('tiny-8-2', 'tiny-4-2', 'tiny-8-2')


@pytest.mark.parametrize(
    ('method', 'values', 'step_values'),
    [
        ('one', {'mimicry_kl'}, {'auxiliary_cross_entropy', 'grad_norm_auxiliary'}),
        pytest.param('okddip', {'mimicry_kl'}, {'grad_norm_auxiliary'}, marks=pytest.mark.slow),
        pytest.param('ffl', {'mimicry_kl'}, {'auxiliary_kl'}, marks=pytest.mark.slow),
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
    config = tiny_config(
        TRIPLE,
        method=method,
        epochs=2,
        batch_size=32,
        data__train_examples=167,
        checkpoint__every_steps=7,
        checkpoint__keep=100,
    )

    def fit(step):
        with Interrupt() as interrupt:
            result = loop.train(config, tmp_path, step, interrupt)
        text = (tmp_path / 'metrics.jsonl').read_text()
        lines = [line for line in map(json.loads, text.splitlines()) if line['kind'] == 'epoch']
        return result['fingerprint'], result['networks'], [line['networks'] for line in lines]

    whole = fit(None)
    assert fit(7) == whole
    rows = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])
    assert values <= rows['networks'][0].keys()
    assert step_values <= rows.keys()
    assert len(drawn) > 0
