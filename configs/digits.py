"""The demo: AFD on scikit-learn's digits, 1,797 real 8x8 images that need no network.

Command: python launch.py --config configs/digits.py

Results: docs/results.md. The recipe is ours (the paper has no such experiment): cosine
instead of steps, larger adversarial rates, and digits are never flipped.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(networks: str = 'resnet8,resnet8') -> ConfigDict:
    """Returns the config of the demo."""
    config = default.get_config(networks)
    config.dataset = 'digits'
    config.epochs = 20
    config.batch_size = 64
    config.eval_batch_size = 360
    config.data.validation_fraction = 0.1
    config.data.pad = 1
    config.data.flip = False
    config.logit.schedule = 'cosine'
    # In 405 steps a discriminator learns nothing at the paper's rate of 2e-5.
    config.feature.learning_rate = 1e-4
    config.discriminator.learning_rate = 1e-3
    config.log_every = 10
    return config
