"""Does learning from each other help when images are few? 200 digits, 5 methods, 10 seeds.

Command: python launch.py --mode study --config configs/studies/digits.py --jobs 2

50 runs of a pair of ResNet-8. Result and time: docs/results.md.
"""

from ml_collections import ConfigDict

from afkd_jax import Study
from configs import digits

METHODS = ('vanilla', 'dml', 'l1_kd', 'adversarial', 'afd')


def get_config(networks: str = 'resnet8,resnet8') -> ConfigDict:
    """Returns the config of the study."""
    config = digits.get_config(networks)
    config.data.train_examples = 200
    config.data.validation_fraction = 0.0
    config.epochs = 40
    config.eval_every = config.checkpoint.every_epochs = 10
    config.study = Study(
        name='digits',
        question=(
            'Which method of online distillation improves a pair of ResNet-8 that is trained on '
            '200 digits?'
        ),
        arms={method: {'method': method} for method in METHODS},
        seeds=range(10),
        baseline='vanilla',
        comparisons=[('afd', 'dml')],
    )
    return config
