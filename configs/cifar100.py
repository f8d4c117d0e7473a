"""AFD on CIFAR-100 with any networks: the paper's pairs and rings, in the recipe of default.py.

Commands, one per row, all not run by us:

  python launch.py --config configs/cifar100.py:NETWORK,NETWORK[,NETWORK]

  same architecture    resnet32,resnet32     resnet56,resnet56     wrn-16-2,wrn-16-2
                       wrn-16-4,wrn-16-4     wrn-28-2,wrn-28-2     wrn-28-4,wrn-28-4
  mixed                resnet32,resnet56     resnet32,wrn-16-4     wrn-16-2,wrn-28-4
                       mobilenet_v2,wrn-28-2
  rings of three       resnet32,resnet32,resnet32                  resnet32,resnet56,wrn-28-2
  ablation             resnet32,resnet32 and each of --config.method=vanilla, dml, kd_ring, l1,
                       l1_kd, adversarial, afd

The paper's numbers, top-1, reported by a third party: a pair of resnet32 alone 69.38 %, logit ring
only 73.38 %, AFD 74.03 %. Which pairs the paper has is from the same source.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(networks: str = 'resnet32,resnet32') -> ConfigDict:
    """Returns the config of a CIFAR-100 experiment."""
    return default.get_config(networks)
