"""The statistics of a report, against numbers found by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from afkd_jax.report import statistics as stats


def compared(differences):
    base = dict(enumerate(np.linspace(60, 61, len(differences))))
    mine = {seed: base[seed] + d for seed, d in enumerate(differences)}
    return stats.compare('a', 'b', mine, base)


def test_the_interval_and_the_counts_of_five_seeds():
    result = compared([0.5, 1.0, 0.0, -0.5, 1.5])
    # mean 0.5, sd sqrt(2.5 / 4), t(0.975, 4) = 2.776445, t(0.95, 4) = 2.131847
    sd = math.sqrt(2.5 / 4)
    assert result.mean == pytest.approx(0.5)
    assert result.sd == pytest.approx(sd)
    for interval, t in ((result.interval, 2.776445), (result.equivalence, 2.131847)):
        half = t * sd / math.sqrt(5)
        assert interval == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)
    assert (result.wins, result.ties, result.losses) == (3, 1, 1)


@pytest.mark.parametrize('differences', [[1.0, 2.0, 3.0], [0.5, -0.2, 0.9, 0.4], [0.3] * 6])
def test_p_is_the_share_of_sign_flips_that_are_as_extreme(differences):
    means = [
        abs(np.dot(signs, differences))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    by_hand = np.mean(np.array(means) >= abs(sum(differences)) - 1e-9)
    assert compared(differences).p == pytest.approx(by_hand)
    if min(differences) > 0:
        assert by_hand == 2 / 2 ** len(differences)


def test_only_seeds_that_both_have_count():
    result = stats.compare('a', 'b', {0: 61.0, 1: 62.0, 7: 99.0}, {0: 60.0, 1: 60.5, 8: 0.0})
    assert result.differences == (1.0, 1.5)
    assert stats.compare('a', 'b', {}, {}).mean is None
    assert stats.compare('a', 'b', {0: 1.0}, {0: 2.0}).verdict == 'cannot tell with 1 seed'


def test_holm():
    ps = [0.01, 0.04, 0.03, None]
    blank = compared([1.0, 2.0])
    found = stats.holm([dataclasses.replace(blank, p=p) for p in ps])
    assert [c.p_holm for c in found] == pytest.approx([0.03, 0.06, 0.06, None])
    assert [c.p for c in found] == ps


def test_the_bootstrap_interval_is_near_that_of_the_normal_distribution():
    rng = np.random.default_rng(1)
    d = rng.normal(0.2, 0.5, 40)
    low, high = compared(d).bca
    half = 1.96 * d.std() / math.sqrt(40)
    assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.04)
    assert compared([0.2, 0.2, 0.2]).bca is None


@pytest.mark.parametrize(
    ('differences', 'p_holm', 'words'),
    [
        ([1.0, 1.1, 0.9, 1.0, 1.2, 0.8], 0.03, 'better'),
        ([-1.0, -1.1, -0.9, -1.0, -1.2, -0.8], 0.03, 'worse'),
        ([0.1, -0.1, 0.05, -0.05, 0.1, -0.1], 1.0, 'no difference larger than 0.3 points'),
        ([2.0, -2.0, 1.5], 1.0, 'cannot tell with 3 seeds; about '),
        ([0.0, 0.0], 1.0, 'no difference larger than 0.3 points'),
    ],
)
def test_verdicts(differences, p_holm, words):
    result = dataclasses.replace(compared(differences), p_holm=p_holm)
    assert result.verdict.startswith(words)


def test_the_standard_deviation_of_few_seeds_counts_by_its_upper_limit():
    # Of two seeds chi-square(0.2, 1) = 0.0642: SD 0.4 counts as 1.58; t intervals of 0.3 need 109.
    assert 'about 109 would tell' in compared([0.0, 0.4 * math.sqrt(2)]).verdict


def test_the_number_of_seeds_that_would_tell():
    # 10 seeds at SD 0.3 have a half-width of 0.21; 6 of 0.31, 7 of 0.28.
    assert stats.seeds_for(0.3, margin=0.215) == 10
    assert stats.seeds_for(0.3) == 7
    assert stats.seeds_for(0.0) == 6
    assert stats.seeds_for(0.0, 11) == 9  # 22 / 2^9 = 0.043
    (one, _) = stats.holm([compared([0.3, -0.3]), compared([1.0, 2.0])])
    assert one.comparisons == 2


def test_the_crossed_bootstrap_covers_images_and_seeds():
    rng = np.random.default_rng(0)
    by_image = rng.choice([-100.0, 0.0, 100.0], 400, p=[0.1, 0.75, 0.15])
    same = np.tile(by_image, (8, 1))  # the seeds agree: only the images vary
    low, high = stats.crossed_bootstrap(same)
    half = 1.96 * by_image.std() / 20
    assert (low, high) == pytest.approx((by_image.mean() - half, by_image.mean() + half), abs=0.6)
    by_seed = np.repeat(rng.normal(1, 3, (8, 1)), 400, 1)  # only the seeds vary
    low, high = stats.crossed_bootstrap(by_seed)
    half = 1.96 * by_seed[:, 0].std() / math.sqrt(8)
    mean = by_seed.mean()
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.4)


def test_calibration():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, True, True, False, True, False])
    ece, mean, accuracy, fraction = stats.calibration(confidence, correct, bins=10)
    assert ece == pytest.approx(100 * (4 / 6 * 0.20 + 2 / 6 * 0.05))
    assert (mean[9], accuracy[9], fraction[9]) == pytest.approx((0.95, 0.75, 4 / 6))
    assert np.isnan(accuracy[0])
