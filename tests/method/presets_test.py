"""Presets, and the two choices behind them."""

import pytest

from afkd_jax.errors import UserError
from afkd_jax.method import presets


@pytest.mark.parametrize(
    ('name', 'logits', 'maps'),
    [
        ('vanilla', 'nobody', 'nothing'),
        ('dml', 'all', 'nothing'),
        ('kd_ring', 'ring', 'nothing'),
        ('l1', 'nobody', 'l1'),
        ('l1_kd', 'ring', 'l1'),
        ('adversarial', 'nobody', 'adversarial'),
        ('afd', 'ring', 'adversarial'),
        ('loo_mean', 'loo_mean', 'nothing'),
        ('kdcl_linear', 'kdcl_linear', 'nothing'),
        ('all+adversarial', 'all', 'adversarial'),
        ('nobody+nothing', 'nobody', 'nothing'),
    ],
)
def test_methods(name, logits, maps):
    assert presets.named(name) == presets.Method(logits, maps)


def test_hops_to_the_teachers_of_the_logits():
    hops = {
        logits: [list(presets.Method(logits, 'nothing').hops(networks)) for networks in (2, 4)]
        for logits in ('nobody', 'ring', 'all')
    }
    assert hops == {'nobody': [[], []], 'ring': [[1], [1]], 'all': [[1], [1, 2, 3]]}


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('vanila', '"vanila"; did you mean "vanilla"'),
        ('rings+l1', r'"rings\+l1".*of nobody, ring, all, .* and nothing, adversarial, l1'),
        ('ring+l2', r'"ring\+l2".*LOGITS\+MAPS'),
        ('l1+ring', r'"l1\+ring"'),
        ('all+', r'"all\+"'),
    ],
)
def test_unknown_method(name, message):
    with pytest.raises(UserError, match=f'config.method: .*{message}'):
        presets.named(name)
