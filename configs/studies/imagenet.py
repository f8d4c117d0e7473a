"""Pairs of ResNet-18 and of ResNet-34 on ImageNet: AFD against DML.

Command: python launch.py --mode study --config configs/studies/imagenet.py

12 runs of 90 epochs; not run.
"""

from ml_collections import ConfigDict

from afkd_jax import Study
from configs import imagenet

NETWORKS = ('resnet18', 'resnet34')


def get_config() -> ConfigDict:
    """Returns the config of the study."""
    config = imagenet.get_config()
    config.study = Study(
        name='imagenet',
        question='Is AFD better than DML for pairs of ResNet-18 and of ResNet-34 on ImageNet?',
        arms={
            f'{name}, {method}': {'networks': (name, name), 'method': method}
            for name in NETWORKS
            for method in ('dml', 'afd')
        },
        seeds=range(3),
        comparisons=[(f'{name}, afd', f'{name}, dml') for name in NETWORKS],
        paper='resnet18: DML 70.19, AFD 70.39; resnet34: DML 73.57, AFD 74.00 (third party)',
    )
    return config
