"""Prints the best trial of each arm of a tuning study, by accuracy on validation.

python -m benchmarks.tuned STUDY

Arms are called 'ARM, VALUE'. The accuracy is that of the networks at the last epoch, on validation,
averaged over networks and seeds; of equal trials the first counts. Test accuracies are not read.
"""

import collections
import pathlib
import statistics
import sys

from afkd_jax.report.results import collect


def main(study):
    trials = collections.defaultdict(dict)
    results = collect(pathlib.Path(study))
    for label in results.study.arms:
        arm, value = label.rsplit(', ', 1)
        found = [run.mean('validation_accuracy') for run in results.of(label)]
        if len(found) < len(results.study.seeds):
            sys.exit(f'{label}: {len(found)} of {len(results.study.seeds)} runs are finished')
        trials[arm][float(value)] = statistics.fmean(found)
    for arm, accuracy in trials.items():
        best = max(accuracy, key=lambda value: accuracy[value])
        words = ', '.join(f'{value:g}: {mean:.2f}' for value, mean in accuracy.items())
        print(f'{arm!r}: {best:g},  # {words}')


if __name__ == '__main__':
    main(*sys.argv[1:])
