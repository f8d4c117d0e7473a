"""The paper's ablation: logits and maps apart and together, pair of ResNet-32 on CIFAR-100.

Command: python launch.py --mode study --config configs/studies/ablation.py

36 runs of 300 epochs; not run.
"""

from ml_collections import ConfigDict

from afkd_jax import Study
from configs import cifar100

METHODS = ('vanilla', 'kd_ring', 'l1', 'l1_kd', 'adversarial', 'afd')


def get_config(networks: str = 'resnet32,resnet32') -> ConfigDict:
    """Returns the config of the study."""
    config = cifar100.get_config(networks)
    config.study = Study(
        name='ablation',
        question='Which part of AFD helps: the logits, the maps, or the adversary instead of L1?',
        arms={method: {'method': method} for method in METHODS},
        seeds=range(6),
        baseline='vanilla',
        comparisons=[('afd', 'kd_ring'), ('afd', 'l1_kd'), ('adversarial', 'l1')],
        paper=(
            'alone 69.38, logit ring 73.38, AFD 74.03; L1 with logits is poor (third party; the '
            'other numbers are not known to us)'
        ),
    )
    return config
