"""AFD on CIFAR-100 with two ResNet-32: the defaults, which every other config starts from.

The paper's top-1, reported by a third party: 74.03 % (alone 69.38 %, logit ring only 73.38 %).
Ours: not run.

Command: python launch.py --config configs/default.py

Every field, with its meaning, default and range, is in afkd_jax/config.py. A config assigns fields;
a name that is not a field is rejected. The networks can follow the file's name:
configs/default.py:resnet32,wrn-16-2 is --config.networks="('resnet32','wrn-16-2')".
"""

from ml_collections import ConfigDict

from afkd_jax.config import default_config


def get_config(networks: str = 'resnet32,resnet32') -> ConfigDict:
    """Returns every field with its default."""
    return default_config(networks)
