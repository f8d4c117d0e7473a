"""Rings of three networks on CIFAR-100: the ring against all other networks as teachers.

Command: python launch.py --mode study --config configs/studies/rings.py

48 runs of 300 epochs; not run.
"""

from ml_collections import ConfigDict

from afkd_jax import Study
from configs import cifar100

RINGS = {
    'equal': ('resnet32', 'resnet32', 'resnet32'),
    'mixed': ('resnet32', 'resnet56', 'wrn-28-2'),
}


def get_config() -> ConfigDict:
    """Returns the config of the study."""
    config = cifar100.get_config()
    config.study = Study(
        name='rings',
        question='With three networks on CIFAR-100: the ring, all as teachers, or the adversary?',
        arms={
            f'{name}, {method}': {'networks': networks, 'method': method}
            for name, networks in RINGS.items()
            for method in ('vanilla', 'dml', 'kd_ring', 'afd')
        },
        seeds=range(6),
        comparisons=[
            (f'{name}, {method}', f'{name}, {against}')
            for name in RINGS
            for method, against in (
                ('dml', 'vanilla'),
                ('kd_ring', 'vanilla'),
                ('afd', 'vanilla'),
                ('afd', 'kd_ring'),
            )
        ],
        paper='it has rings of three; the numbers are not known to us',
    )
    return config
