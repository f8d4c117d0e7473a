"""AFD on Fashion-MNIST: 60,000 + 10,000 real grey 28x28 images in ten classes.

The images come from Debian's package: apt-get install dataset-fashion-mnist
Command: python launch.py --config configs/fashion_mnist.py
On a small machine, with the first 10,000 images of a fixed permutation:
  python launch.py --config configs/fashion_mnist.py --config.data.train_examples=10000

Not run with this version. The recipe is ours (the paper has no such experiment).
"""

from ml_collections import ConfigDict

from configs import default


def get_config(networks: str = 'resnet8,resnet8') -> ConfigDict:
    """Returns the config of the Fashion-MNIST experiment."""
    config = default.get_config(networks)
    config.dataset = 'idx:/usr/share/datasets/fashion-mnist'
    config.epochs = 12
    config.data.validation_fraction = 0.1
    config.data.pad = 2
    config.logit.schedule = 'cosine'
    return config
