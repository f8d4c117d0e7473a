"""Which adversary helps when images are few? 200 digits, `afd` with each switch, 10 seeds.

Commands:

  python launch.py --mode study --config configs/studies/digits_adversary.py:tuning --jobs 2
  python -m benchmarks.tuned runs/digits_adversary_tuning
  python launch.py --mode study --config configs/studies/digits_adversary.py --jobs 2

The first tries three values of one field for every arm, with seeds 100 and 101. The second prints
the best of each by the accuracy on 1,238 validation images: TUNED below. The third compares the
arms so tuned with other seeds. Result and time: docs/results.md.
"""

from ml_collections import ConfigDict

from afkd_jax import Study
from configs.studies import digits

ARMS = {
    'dml': {'method': 'dml'},
    'afd': {},
    'lsgan_linear': {'discriminator.loss': 'lsgan_linear'},
    'hinge': {'discriminator.loss': 'hinge'},
    'joint': {'discriminator.norm': 'joint'},
    'spectral': {'discriminator.norm': 'spectral'},
    'no norm': {'discriminator.norm': 'none'},
    'label': {'discriminator.condition': 'label'},
    'probabilities': {'discriminator.condition': 'probabilities'},
    'hinge, spectral, label': {
        'discriminator.loss': 'hinge',
        'discriminator.norm': 'spectral',
        'discriminator.condition': 'label',
    },
    'patch': {'discriminator.input': 'patch'},
    'pooled': {'discriminator.input': 'pooled'},
    'r1': {'discriminator.r1': 1.0},
    'better_only': {'adversarial.direction': 'better_only'},
    'logit optimizer': {'adversarial.optimizer': 'logit'},
    'gradnorm': {'adversarial.optimizer': 'logit', 'adversarial.balance': 'gradnorm'},
}
TRIALS = dict.fromkeys(ARMS, ('feature.learning_rate', (1e-4, 3e-4, 1e-3))) | {
    'dml': ('loss.kl_weight', (0.3, 1.0, 3.0)),
    'logit optimizer': ('loss.adversarial_weight', (0.03, 0.1, 0.3)),
    'gradnorm': ('loss.adversarial_weight', (0.03, 0.1, 0.3)),
}


def get_config(mode: str = '') -> ConfigDict:
    """Returns the config of the study, or with 'tuning' that of its trials."""
    config = digits.get_config()
    config.data.train_examples = 0
    config.data.validation_fraction = 0.861  # 200 of 1,438 are left
    if mode == 'tuning':
        arms = {
            f'{arm}, {value}': fields | {TRIALS[arm][0]: value}
            for arm, fields in ARMS.items()
            for value in TRIALS[arm][1]
        }
        config.study = Study('digits_adversary_tuning', '', arms, seeds=(100, 101))
    else:
        arms = {arm: fields | {TRIALS[arm][0]: TUNED[arm]} for arm, fields in ARMS.items()}
        config.study = Study(
            name='digits_adversary',
            question='Which adversary adds to the logits of a pair of ResNet-8 on 200 digits?',
            arms=arms,
            seeds=range(10),
            baseline='dml',
        )
    return config
