"""Whether two models differ by more than chance: runs of both with the same seeds, in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Difference(NamedTuple):
    """A mean difference and its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def is_told_apart(self) -> bool:
        """Whether 0 is outside of the interval; False for NaN."""
        return self.low > 0 or self.high < 0


def difference(first: Sequence[float], second: Sequence[float], error: float = 0.0) -> Difference:
    """The mean of first_s − second_s over seeds s, and where it would lie with other seeds and another test text.

        mean ± √(t² sd²/n + z² error²)

    sd is the standard deviation of the n differences. t and z are the quantiles of Student's distribution with n − 1
    degrees of freedom and of the normal distribution for an interval of ``LEVEL``. Without ``error`` it is the interval
    of the paired t-test. Both parts together (Zou & Donner 2008) hold the true difference a little more often than
    ``LEVEL`` says.

    Args:
      first, second: a number for each seed, of the same seeds in the same order.
      error: the standard error of the mean difference that does not stem from the seeds, as that of the sentences of a
        test set.

    Raises:
      ValueError: not as many runs of both, or less than two, which say nothing about other seeds.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"the runs must be of the same seeds, two or more, got {len(first)} and {len(second)} runs")
    differences = np.subtract(first, second)
    mean, count = float(np.mean(differences)), len(differences)
    quantile = (1 + LEVEL) / 2
    by_seeds = float(stats.t.ppf(quantile, count - 1) * np.std(differences, ddof=1)) / math.sqrt(count)
    half = math.hypot(by_seeds, float(stats.norm.ppf(quantile)) * error)
    return Difference(mean, mean - half, mean + half)


def report(title: str, differences: Mapping[tuple[str, str], Difference], form: str = ".2f") -> str:
    """The pairs of models that are told apart and those that are not, in lines of text.

    Args:
      title: what is compared.
      differences: of each pair of names, the first less the second.
      form: the format of the numbers.
    """
    lines = [f"{title}: mean difference ({LEVEL:.0%} interval of each pair)"]
    for heading, told_apart in (("told apart", True), ("not told apart", False)):
        pairs = {pair: d for pair, d in differences.items() if d.is_told_apart == told_apart}
        lines.append(f"  {heading}{'' if pairs else ': none'}")
        width = max((len(name) for pair in pairs for name in pair), default=0)
        for (first, second), (mean, low, high) in pairs.items():
            numbers = f"{mean:+{form}} ({low:+{form}} to {high:+{form}})"
            lines.append(f"    {first:{width}} − {second:{width}}  {numbers}")
    return "\n".join(lines)
