"""Which method helps when images are few? 200 digits, every method for a pair, 10 seeds.

Command: python launch.py --mode study --config configs/studies/digits_methods.py --jobs 2

220 runs of a pair of ResNet-8. 50 more images are for validation, which `kdcl_general` needs.
Averages of the weights are evaluated for every method. `okddip` needs three networks and is left
out. For a pair, `kd_ring`, `loo_mean` and `dml` are the same. Result and time: docs/results.md.
"""

from ml_collections import ConfigDict

from afkd_jax import Study
from configs.studies import digits

METHODS = (
    'dml',
    'shuffled',
    'kdcl_naive',
    'kdcl_minlogit',
    'kdcl_mean',
    'kdcl_linear',
    'kdcl_general',
    'one',
    'ffl',
    'mcl',
    'switokd',
    'l1',
    'l1_kd',
    'moments',
    'adversarial',
    'afd',
)


def get_config(networks: str = 'resnet8,resnet8') -> ConfigDict:
    """Returns the config of the study."""
    config = digits.get_config(networks)
    config.data.train_examples = 250
    config.data.validation_fraction = 0.2
    config.ema.decay = 0.95
    config.study = Study(
        name='digits_methods',
        question=(
            'Which method of online distillation improves a pair of ResNet-8 that is trained on '
            '200 digits?'
        ),
        arms={
            'vanilla': {'method': 'vanilla'},
            'vanilla, smoothing': {'method': 'vanilla', 'loss.label_smoothing': 0.1},
            # As many operations as `afd`, which takes 1.72 times those of `vanilla`.
            'vanilla, longer': {'method': 'vanilla', 'epochs': 69},
            **{method: {'method': method} for method in METHODS},
            'dml, ema': {'method': 'dml', 'teacher': 'ema'},
            'afd, ema': {'method': 'afd', 'teacher': 'ema'},
            'kdcl_mean, own views': {'method': 'kdcl_mean', 'data.views': 'own'},
        },
        seeds=range(10),
        baseline='vanilla',
        comparisons=[('afd', 'dml')],
    )
    return config
