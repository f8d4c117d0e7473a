"""What does AFD add on 5,000 images of CIFAR-100? A pair of ResNet-8, 40 epochs, 8 arms, 10 seeds.

Command, on prepared images (docs/data.md):

  python launch.py --mode study --config configs/studies/cifar100_small.py \
    --config.data.data_dir=DIR

The recipe is that of configs/default.py. Not run: by --dry_run the 80 runs take about 21 hours on 2
cores of an AMD EPYC (AVX-512).

Adam moves a parameter by about the learning rate a step, so the sum of the rates bounds what the
adversary can do. In the paper's recipe it is 391 * 2e-5 * (75 + 7.5 + 1.5) = 0.66; here, at 2e-5,
it is 75 times less. The arms `rate` have the paper's sum, for L_G and the discriminators.
"""

from ml_collections import ConfigDict

from afkd_jax import Study
from configs import default

EPOCHS, STEPS_PER_EPOCH = 40, 5000 // 128
# The rate falls to 0.1 and 0.01 of its first value at a quarter and half of the run.
SUM_OF_RATES = 391 * 300 * (1 / 4 + 0.1 / 4 + 0.01 / 2) * 2e-5
RATE = round(SUM_OF_RATES / (STEPS_PER_EPOCH * EPOCHS * (1 / 4 + 0.1 / 4 + 0.01 / 2)), 6)
RATES = {'feature.learning_rate': RATE, 'discriminator.learning_rate': RATE}
RAMP = {'loss.kl_ramp_up': 80 / 300}  # as the neighbours have it: 80 of 300 epochs


def get_config(networks: str = 'resnet8,resnet8') -> ConfigDict:
    """Returns the config of the study."""
    config = default.get_config(networks)
    config.data.train_examples = 5000
    config.epochs = EPOCHS
    config.eval_every = 10
    config.study = Study(
        name='cifar100_small',
        question=(
            'Pair of ResNet-8 on 5,000 images of CIFAR-100: does the adversary add to the logits, '
            "at the paper's rate and at the paper's sum of rates?"
        ),
        arms={
            'vanilla': {'method': 'vanilla'},
            'dml': {'method': 'dml'},
            'afd': {'method': 'afd'},
            'afd, rate': {'method': 'afd'} | RATES,
            'adversarial': {'method': 'adversarial'},
            'l1_kd': {'method': 'l1_kd'},
            'dml, ramp': {'method': 'dml'} | RAMP,
            'afd, rate, ramp': {'method': 'afd'} | RATES | RAMP,
        },
        seeds=range(10),
        baseline='vanilla',
        comparisons=[
            ('afd', 'dml'),
            ('afd, rate', 'dml'),
            ('afd, rate', 'afd'),
            ('afd, rate, ramp', 'dml, ramp'),
        ],
        paper='a pair of ResNet-32 on all images: vanilla 69.38, logit ring 73.38, AFD 74.03',
    )
    return config
