"""Train, evaluate, use, describe, plan or benchmark an experiment, or prepare its images.

python launch.py --config configs/digits.py [--config.FIELD=VALUE ...]
                 [--mode train|study|report|eval|predict|export|describe|plan|benchmark|prepare]

Every field is in afkd_jax/config.py; a tuple is written as "('resnet8','resnet20')".
"""

import dataclasses
import sys
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from afkd_jax import cli
from afkd_jax.command import Options

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment; see configs/.')
flags.DEFINE_enum('mode', 'train', list(cli.MODES), 'What to do.')
flags.DEFINE_string('workdir', None, 'Directory of the run [runs/<config and overrides>].')
flags.DEFINE_string('step', None, "Checkpoint: a step, 'last' or 'best' (on validation) [last].")
flags.DEFINE_bool('extend', False, 'Train: config.epochs of the run in the workdir may grow.')
flags.DEFINE_string('network', None, "Predict, export: 1, 2, ... or 'ensemble' [1].")
flags.DEFINE_list('images', [], 'Predict: image files, or directories with images at any depth.')
flags.DEFINE_string('output', None, 'Predict, export: the file to write [in the workdir].')
flags.DEFINE_enum('format', None, ['safetensors', 'stablehlo'], 'Export: the format.')
flags.DEFINE_string('coordinator_address', None, 'HOST:PORT of process 0, among several.')
flags.DEFINE_integer('num_processes', None, 'Number of processes of the run.', lower_bound=1)
flags.DEFINE_integer('process_id', None, "This process's number, from 0.", lower_bound=0)
flags.DEFINE_string('topology', None, 'To plan for, e.g. v5e-16 or h100-8 [the devices at hand].')
flags.DEFINE_bool('largest_batch', False, 'Plan: search the largest batch that fits.')
flags.DEFINE_string(
    'sweep',
    None,
    "Benchmark: fields to vary, e.g. 'k=2,4;method=afd,vanilla'; also batch_size, dtype.",
)
flags.DEFINE_bool('json', False, 'Print the result on stdout as JSON, all else on stderr.')
flags.DEFINE_string(
    'study', None, "Study: fields with their values, e.g. 'method=vanilla,dml,afd;seed=0:10'."
)
flags.DEFINE_integer('jobs', None, 'Study: processes on this machine [1].', lower_bound=1)
flags.DEFINE_bool('dry_run', False, 'Study: list the runs and estimate their cost.')
flags.DEFINE_bool('verify', False, 'Prepare: read every image.')
flags.DEFINE_bool('debug', False, 'Show the traceback of an error.')


def main(_: list[str]) -> None:
    """Runs the mode and exits with its code."""
    names = (field.name for field in dataclasses.fields(Options))
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
    options = Options(**values)
    sys.exit(cli.main(_CONFIG, options))


if __name__ == '__main__':
    app.run(main, flags_parser=cli.parse)
