"""Whether runs of two models differ by more than chance."""

import numpy as np
import pytest
from scipy import stats

from experiments.run.significance import difference, report

DRAW = np.random.default_rng(0)


def test_without_another_error_it_is_the_interval_of_the_paired_t_test():
    first, second = DRAW.normal(size=(2, 4))
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    got = difference(first, second)
    np.testing.assert_allclose(got, (np.mean(first - second), interval.low, interval.high), rtol=1e-12)


def test_the_interval_holds_the_true_difference_in_95_of_100_cases_or_a_few_more():
    """Five seeds, and an error that all of them share. The seeds alone would hold it in about 67 of 100 cases."""
    hits = 0
    for _ in range(2000):
        shared, seeds = DRAW.normal(0, 1), DRAW.normal(0, 0.6, (2, 5))
        _, low, high = difference(1 + shared + seeds[0], seeds[1], 1.0)
        hits += low <= 1 <= high
    assert 1870 < hits < 1980  # 95 to 98 of 100, and 3 standard deviations


def test_a_run_that_diverged_is_not_told_apart():
    assert not difference([np.nan, 1.0], [0.0, 0.1]).is_told_apart


@pytest.mark.parametrize(("first", "second", "error"), [([], [], 1.0), ([1.0], [2.0], 1.0), ([1.0, 2.0], [1.0], 1.0)])
def test_runs_that_do_not_make_pairs_are_refused(first, second, error):
    with pytest.raises(ValueError, match=f"got {len(first)} and {len(second)} runs"):
        difference(first, second, error)


def test_the_report_names_both_kinds():
    pairs = {("a", "b"): difference([1.0, 1.1], [0.0, 0.1]), ("a", "c"): difference([1.0, 1.0], [0.0, 2.0])}
    assert report("loss", pairs).splitlines() == [
        "loss: mean difference (95% interval of each pair)",
        "  told apart",
        "    a − b  +1.00 (+1.00 to +1.00)",
        "  not told apart",
        "    a − c  +0.00 (-12.71 to +12.71)",
    ]
