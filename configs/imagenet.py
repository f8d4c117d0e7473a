"""AFD on ImageNet: pairs of ResNet-18 and ResNet-34.

Commands, one per row:

  python launch.py --config configs/imagenet.py:resnet18,resnet18
  python launch.py --config configs/imagenet.py:resnet34,resnet34
  python launch.py --config configs/imagenet.py:resnet18,resnet34

Not run. The images come from TFDS, prepared once by --mode prepare, or from unpacked folders by
--config.dataset=folder:DIR. The paper's top-1 %, reported by a third party:
ResNet-18 DML 70.19, AFD 70.39; ResNet-34 DML 73.57, AFD 74.00. Its recipe is not known to us; this
is the usual one of these networks, with the adversarial schedule of default.py.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(networks: str = 'resnet18,resnet18') -> ConfigDict:
    """Returns the config of an ImageNet experiment."""
    config = default.get_config(networks)
    config.dataset = 'tfds:imagenet2012'
    config.epochs = 90
    config.batch_size = 256
    config.data.test_split = 'validation'  # of its test images the labels are not public
    config.data.image_size = 224
    config.data.pad = 0  # the random crop comes first
    # The training images' own, as everyone rounds them.
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.logit.boundaries = (1 / 3, 2 / 3)  # epochs 30 and 60
    return config
