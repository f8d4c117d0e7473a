"""Train, evaluate, describe or plan an experiment.

python launch.py --config configs/digits.py [--config.FIELD=VALUE ...]
                 [--mode train|eval|describe|plan]

Every field is in configs/default.py; a tuple is written as "('resnet8','resnet20')".
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from afkd_jax import cli

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment; see configs/.')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Where the run is kept [runs/<config and overrides>].'
)
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'eval', 'describe', 'plan'], 'What to do.')
_STEP = flags.DEFINE_integer(
    'step', None, 'Which checkpoint eval takes, or train goes on from [the newest].', lower_bound=0
)
_TOPOLOGY = flags.DEFINE_string(
    'topology', None, 'For which TPU to plan, e.g. v5e-16 [the devices at hand].'
)
_LARGEST = flags.DEFINE_bool('largest_batch', False, 'Plan: search the largest batch that fits.')
_ADDRESS = flags.DEFINE_string(
    'coordinator_address', None, 'HOST:PORT of process 0, where several processes run together.'
)
_PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'How many processes run together.', lower_bound=1
)
_PROCESS = flags.DEFINE_integer('process_id', None, 'Which of them this is.', lower_bound=0)
_DEBUG = flags.DEFINE_bool('debug', False, 'Show the traceback of an error.')


def main(_: list[str]) -> None:
    """Runs the mode and exits with its code."""
    where = _ADDRESS.value, _PROCESSES.value, _PROCESS.value
    planned = _TOPOLOGY.value, _LARGEST.value
    sys.exit(
        cli.main(_MODE.value, _CONFIG, _WORKDIR.value, _STEP.value, where, planned, _DEBUG.value)
    )


if __name__ == '__main__':
    app.run(main, flags_parser=cli.parse)
