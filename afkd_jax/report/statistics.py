"""Paired comparisons over seeds, by scipy.

The unit is the seed: both arms were trained with it, and the difference of their accuracies is one
observation. Accuracies and differences are in percent points.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

MARGIN = 0.3  # differences within +- this are no difference that matters; our choice
_RESAMPLES = 9999
_EXACT = 20  # up to so many seeds all 2^n sign flips are taken


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One arm against another, over the seeds that both have.

    Attributes:
      mean: of the differences; None without seeds.
      sd: of the differences; None below two seeds, as the next two.
      interval: 95 % t interval of the mean.
      equivalence: 90 % t interval; two one-sided tests at 5 % are its being within +- MARGIN.
      bca: 95 % bias-corrected and accelerated bootstrap interval; None below three seeds, or of
        equal differences. Unreliable below about eight seeds.
      p: of the exact two-sided sign-flip test; None below two seeds.
      p_holm: p, corrected by Holm over the comparisons of a report.
      comparisons: how many those are.
      wins: seeds with a positive difference; ties and losses likewise.
    """

    arm: str
    against: str
    differences: tuple[float, ...]
    mean: float | None
    sd: float | None
    interval: tuple[float, float] | None
    equivalence: tuple[float, float] | None
    bca: tuple[float, float] | None
    p: float | None
    wins: int
    ties: int
    losses: int
    p_holm: float | None = None
    comparisons: int = 1

    @property
    def verdict(self) -> str:
        """Returns what can be said, in words."""
        n = len(self.differences)
        if self.mean is None or self.interval is None or self.equivalence is None:
            return f'cannot tell with {n} seed{"s" if n != 1 else ""}'
        if self.p_holm is not None and self.p_holm < 0.05:
            return 'better' if self.mean > 0 else 'worse'
        low, high = self.equivalence
        if low > -MARGIN and high < MARGIN:
            return f'no difference larger than {MARGIN} points'
        assert self.sd is not None
        # Few seeds say little about the standard deviation: its 80 % upper limit counts.
        sd = self.sd * math.sqrt((n - 1) / stats.chi2.ppf(0.2, n - 1))
        needed = max(seeds_for(sd, self.comparisons), n + 1)
        return f'cannot tell with {n} seeds; about {needed} would tell {MARGIN} points'


def seeds_for(sd: float, comparisons: int = 1, margin: float = MARGIN) -> int:
    """Returns the seeds at which half the 95 % t interval is at most `margin`.

    At least so many that the sign-flip test can reach p_holm < 0.05: 6 for one comparison.

    Args:
      sd: of the paired differences.
      comparisons: over which p is corrected.
      margin: in percent points.
    """
    n = next(n for n in itertools.count(1) if comparisons * 2 / 2**n < 0.05)
    while stats.t.ppf(0.975, n - 1) * sd / math.sqrt(n) > margin and n < 10_000:
        n += 1
    return n


def compare(arm: str, against: str, mine: dict[int, float], theirs: dict[int, float]) -> Comparison:
    """Returns the comparison of two arms; p_holm is missing.

    Args:
      arm: label.
      against: label.
      mine: seed -> accuracy of the arm, percent.
      theirs: seed -> accuracy of the other.
    """
    d = np.array([mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())])
    d = d.round(9)  # equal accuracies of different sums are ties
    interval = equivalence = bca = p = sd = None
    if len(d) >= 2:
        sd = float(d.std(ddof=1)) if np.ptp(d) else 0.0
        if sd:
            test = stats.ttest_1samp(d, 0)
            interval, equivalence = (
                (float(found.low), float(found.high))
                for found in map(test.confidence_interval, (0.95, 0.9))
            )
        else:  # scipy has no interval of equal values
            interval = equivalence = (float(d[0]), float(d[0]))
        flips: Any = np.inf if len(d) <= _EXACT else _RESAMPLES
        p = float(
            stats.permutation_test(
                (d,), np.mean, permutation_type='samples', n_resamples=flips, rng=0
            ).pvalue
        )
    if len(d) >= 3 and sd:
        found = stats.bootstrap((d,), np.mean, n_resamples=_RESAMPLES, method='BCa', rng=0)
        low, high = found.confidence_interval
        bca = (float(low), float(high)) if math.isfinite(low + high) else None
    return Comparison(
        arm,
        against,
        tuple(d.tolist()),
        float(d.mean()) if len(d) else None,
        sd,
        interval,
        equivalence,
        bca,
        p,
        *(int(count) for count in ((d > 0).sum(), (d == 0).sum(), (d < 0).sum())),
    )


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Returns the comparisons with p_holm: max over j <= i of (m - j) p_(j), at most 1.

    p_(0) <= p_(1) ... are the m values of p that there are. Source: Holm 1979; scipy has none.
    """
    known = sorted((c for c in comparisons if c.p is not None), key=lambda c: c.p or 0)
    corrected: dict[int, float] = {}
    largest = 0.0
    for j, comparison in enumerate(known):
        assert comparison.p is not None
        largest = max(largest, min(1.0, (len(known) - j) * comparison.p))
        corrected[id(comparison)] = largest
    return [
        dataclasses.replace(c, p_holm=corrected.get(id(c)), comparisons=max(len(known), 1))
        for c in comparisons
    ]


def crossed_bootstrap(differences_SxN: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """Returns the 95 % interval of the mean over seeds and test images, both resampled.

    It covers the choice of the test images too, which an interval over seeds does not.

    Args:
      differences_SxN: of S seeds and N images, in percent points: 100 where only this arm is right.
      resamples: of seeds and, independently, images.
    """
    seeds, images = differences_SxN.shape
    rng, means = np.random.default_rng(0), []
    for _ in range(resamples):
        by_image = differences_SxN[rng.integers(0, seeds, seeds)].mean(0)
        means.append(by_image @ rng.multinomial(images, np.full(images, 1 / images)) / images)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def calibration(
    confidence_N: np.ndarray, correct_N: np.ndarray, bins: int = 15
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (ECE in percent points, and per bin: mean confidence, accuracy, fraction of images).

    ECE is sum over bins of fraction |accuracy - confidence|, over bins of equal width; empty bins
    are NaN. Source: Guo et al. 2017.

    Args:
      confidence_N: probability of the predicted class.
      correct_N: bool.
      bins: of confidence in (0, 1].
    """
    count, mean, accuracy = (
        stats.binned_statistic(confidence_N, values, kind, bins, (0, 1)).statistic
        for kind, values in (
            ('count', confidence_N),
            ('mean', confidence_N),
            ('mean', np.asarray(correct_N, float)),
        )
    )
    fraction = count / max(len(confidence_N), 1)
    return float(100 * np.nansum(fraction * np.abs(accuracy - mean))), mean, accuracy, fraction
