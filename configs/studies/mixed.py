"""Pairs of different networks on CIFAR-100: does the smaller one gain most?

Command: python launch.py --mode study --config configs/studies/mixed.py

72 runs of 300 epochs; not run. The pairs are those of configs/cifar100.py.
"""

from ml_collections import ConfigDict

from afkd_jax import Study
from configs import cifar100

PAIRS = (
    ('resnet32', 'resnet56'),
    ('resnet32', 'wrn-16-4'),
    ('wrn-16-2', 'wrn-28-4'),
    ('mobilenet_v2', 'wrn-28-2'),
)


def get_config() -> ConfigDict:
    """Returns the config of the study."""
    config = cifar100.get_config()
    config.study = Study(
        name='mixed',
        question='What do DML and AFD add to pairs of different networks on CIFAR-100?',
        arms={
            f'{"+".join(pair)}, {method}': {'networks': pair, 'method': method}
            for pair in PAIRS
            for method in ('vanilla', 'dml', 'afd')
        },
        seeds=range(6),
        comparisons=[
            (f'{"+".join(pair)}, {method}', f'{"+".join(pair)}, {against}')
            for pair in PAIRS
            for method, against in (('dml', 'vanilla'), ('afd', 'vanilla'), ('afd', 'dml'))
        ],
        paper='the gain is largest for the small network (abstract); numbers are not known to us',
    )
    return config
