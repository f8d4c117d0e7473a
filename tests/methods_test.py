"""Presets."""

import pytest

from afkd_jax import methods
from afkd_jax.errors import UserError


@pytest.mark.parametrize(
    ('name', 'logits', 'maps', 'teaches'),
    [
        ('vanilla', 'nobody', 'nothing', False),
        ('kd_ring', 'ring', 'nothing', True),
        ('adversarial', 'nobody', 'adversarial', True),
        ('afd', 'ring', 'adversarial', True),
    ],
)
def test_presets(name, logits, maps, teaches):
    method = methods.named(name)
    assert (method.logits, method.maps, method.teaches) == (logits, maps, teaches)


def test_unknown_method():
    with pytest.raises(UserError, match=r'config.method: .*"vanila"; did you mean "vanilla"'):
        methods.named('vanila')
