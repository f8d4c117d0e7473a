"""Measures how often the intervals of a report contain the true mean difference.

python -m benchmarks.coverage [STUDIES]

Simulated studies: normal differences of mean 0.2 and standard deviation 0.4 points over n seeds.
Prints, for each n, in percent: how often the t interval and the BCa interval contain 0.2, and how
often the sign-flip test gives p < 0.05 where the true mean is 0. Results: docs/studies.md.
"""

import sys

import numpy as np

from afkd_jax.report import statistics

MEAN, SD = 0.2, 0.4


def main(studies='1000'):
    rng = np.random.default_rng(0)
    for n in (3, 6, 10):
        hits = np.zeros(3)
        for _ in range(int(studies)):
            noise = rng.normal(0, SD, n)
            seeds = dict.fromkeys(range(n), 0.0)
            found = statistics.compare('a', 'b', dict(enumerate(MEAN + noise)), seeds)
            null = statistics.compare('a', 'b', dict(enumerate(noise)), seeds)
            for column, interval in enumerate((found.interval, found.bca)):
                hits[column] += interval is not None and interval[0] <= MEAN <= interval[1]
            hits[2] += null.p is not None and null.p < 0.05
        t, bca, error = 100 * hits / int(studies)
        print(f'n = {n}: t {t:.1f}, BCa {bca:.1f}, p < 0.05 without a difference {error:.1f}')


if __name__ == '__main__':
    main(*sys.argv[1:])
